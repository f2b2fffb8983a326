"""What quantizing a channel does to the action: the table, how it is estimated and checked."""
