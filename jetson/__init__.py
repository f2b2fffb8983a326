"""On the robot: action server, latency profile, board state. Never imports torch or onnx."""
