"""What each family does in training, one `Learner` a kind of loss."""
