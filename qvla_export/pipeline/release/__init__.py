"""Releases: keys, signing, and repositories that any static server hands out."""
