"""Baselines made by kept libraries, judged by the same code as our own plans."""
