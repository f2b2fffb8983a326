"""Passes over a float graph and its widths, before `qvla_export.bucketize`; one pass a file."""
