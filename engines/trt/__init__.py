"""TensorRT and TensorRT for RTX: build engines of a bundle's parts, vouch for them, run them."""
