"""Help panel *Deploy*: from a checkpoint to a verified bundle, all at once or a stage at a time."""
