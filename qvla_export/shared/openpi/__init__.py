"""What checkpoints of openpi say, without torch."""
