"""Call parts on ONNX Runtime with tensors that stay in the runtime, bound and never copied."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime

from engines.base import Feeds
from qvla_export.shared.part import Part

# An `onnxruntime.OrtValue`, by name.
OrtValues = Mapping[str, Any]


def to_ort(feeds: Feeds) -> dict[str, Any]:
    """Return arrays as the runtime's tensors, which read the arrays' own memory."""
    return {name: onnxruntime.OrtValue.ortvalue_from_numpy(v) for name, v in feeds.items()}


def call_part(session: Any, part: Part, inputs: OrtValues, device: str) -> dict[str, Any]:
    """Run a part's session once.

    Args:
        session: the part's `onnxruntime.InferenceSession`.
        part: names its outputs.
        inputs: by name; outputs of other calls go in as they are.
        device: "cpu" or "cuda", where outputs are allocated and stay.

    Returns:
        Outputs by name; they live as long as someone holds them.
    """
    binding = session.io_binding()
    for name, value in inputs.items():
        binding.bind_ortvalue_input(name, value)
    for spec in part.outputs:
        binding.bind_output(spec.name, device)
    session.run_with_iobinding(binding)
    names = [spec.name for spec in part.outputs]
    return dict(zip(names, binding.get_outputs(), strict=True))


def copied(values: OrtValues) -> dict[str, Any]:
    """Return the same numbers in tensors that belong to no session, in host memory."""
    copies = {}
    for name, value in values.items():
        array = value.numpy()
        copies[name] = onnxruntime.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype)
        copies[name].update_inplace(np.ascontiguousarray(array).reshape(array.shape))
    return copies
