"""What runs on the robot: serving, the control loop, recordings and load, the doctor."""
