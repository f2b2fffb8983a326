"""Closed-loop rollouts and their success."""
