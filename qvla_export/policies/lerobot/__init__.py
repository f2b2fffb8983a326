"""What families in LeRobot's layout share: files, weights by their keys, a `Family`."""
