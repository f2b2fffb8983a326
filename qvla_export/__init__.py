"""Host side: policies, sensitivities, bit plans, bucketed ONNX and the bundle a robot receives."""
