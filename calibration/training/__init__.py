"""Train a small policy on demonstrations."""
