"""Latency profiles of an action: measured, compared, and read from other tools."""
