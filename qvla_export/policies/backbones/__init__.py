"""Published networks by themselves, as a test bed: what they put out stands for the action."""
