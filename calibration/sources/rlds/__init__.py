"""RLDS: tensorflow-datasets' TFRecord files, read without TensorFlow."""
