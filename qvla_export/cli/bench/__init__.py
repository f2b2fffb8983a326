"""`qvla bench`: what only times."""
