"""The protocols that clients of OpenVLA, openpi and GR00T speak; one file a protocol."""
