"""`qvla bench engines`: a decoder stack under every engine that runs on this machine's CPU."""
