"""What is set wrongly on a machine, for a bundle or a checkpoint, and what mends it."""
