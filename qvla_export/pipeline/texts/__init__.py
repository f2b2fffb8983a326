"""What results say at a terminal: lines and tables; `cli` prints them."""
