"""What a LeRobot checkpoint says of its policy, read without torch."""
