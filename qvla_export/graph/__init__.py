"""A policy and its plan -> bucketed ONNX graphs with packed weights, in a bundle."""
