"""The live page: what the robot sees, does and how long it takes, in a browser."""
