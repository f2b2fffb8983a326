"""Signed releases on a robot: fetched, checked, switched, taken back; a power cut harms none."""
