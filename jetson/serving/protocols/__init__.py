"""The protocols that clients of OpenVLA, openpi, GR00T and vla-eval speak; one file a protocol."""
