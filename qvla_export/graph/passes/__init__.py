"""Passes over a float graph and its widths, one a file, before `bucketize` writes the nodes."""
