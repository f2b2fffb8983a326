"""Runs kept as MCAP files, and replayed."""
