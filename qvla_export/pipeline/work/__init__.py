"""What each artifact of a run was made from and what that cost."""
