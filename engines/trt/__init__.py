"""TensorRT and TensorRT for RTX: build engines of a bundle's parts, seal them, run them."""
