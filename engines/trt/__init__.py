"""TensorRT and TensorRT for RTX: build engines of a bundle's stages, vouch for them, run them."""
