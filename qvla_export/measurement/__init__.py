"""Runs the policy and sums what happens inside it: gradients, moments, activations."""
