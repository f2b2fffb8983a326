"""The comparison over seeds: every contestant planned, run and judged, in one folder a seed."""
