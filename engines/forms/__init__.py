"""In which form a runtime holds a layer's weights, chosen when a graph is loaded; without onnx."""
