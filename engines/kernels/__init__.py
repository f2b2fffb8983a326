"""Products of rows with weights of a width per channel, in Triton; imported when opened by name."""
