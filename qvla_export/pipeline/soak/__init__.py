"""A server and a control loop under attack for hours, and what came of every request."""
