"""Recorded demonstrations, read from and written to the formats people have."""
