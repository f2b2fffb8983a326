"""What pictures may be like, and how they are made smaller."""
