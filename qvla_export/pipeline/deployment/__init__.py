"""What comes of a deployment."""
