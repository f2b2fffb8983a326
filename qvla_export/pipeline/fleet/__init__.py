"""Releases to many robots over ssh: who they are, in which waves, and how each answered."""
