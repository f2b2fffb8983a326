"""The control loop on the robot: observations in, safe commands out, on time."""
