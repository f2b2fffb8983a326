"""What families in LeRobot's layout share: weights by their keys, and a `Policy` on them."""
