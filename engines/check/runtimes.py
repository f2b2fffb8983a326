"""What each runtime's oldest version reads: operator sets and element types."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from engines.trt.modules import is_tensorrt
from qvla_export.shared.target import Runtime, Target

Version = tuple[int, ...]


@dataclass(frozen=True)
class Reader:
    """The ONNX parser of one runtime, from a version on."""

    since: Version
    # Highest operator set its documents name, and the one its ONNX release knows.
    documented_opset: int
    known_opset: int
    ir_version: int
    source: str
    # TensorRT version whose operators and limits it has; None for its own version.
    operators: Version | None = None


# Operator sets and IR of ONNX: 1.16 is 21 and 10, 1.18 is 23 and 11, 1.19 is 24 and 12, 1.20 is
# 25 and 13 (onnx docs/Versioning.md). Newest last.
READERS: Mapping[Runtime, tuple[Reader, ...]] = {
    "tensorrt": (
        Reader(
            (10, 3),
            20,
            21,
            10,
            "onnx-tensorrt docs/operators.md 10.1 says opset 9 to 20; its commit 1cf3d06 builds "
            "with ONNX 1.16, docs/Changelog.md moves to 1.17 in 10.6; 10.3's own page not found",
        ),
        Reader((10, 11), 23, 23, 11, "onnx-tensorrt docs/Changelog.md 10.11: ONNX 1.18"),
        Reader((10, 15), 24, 24, 12, "onnx-tensorrt docs/operators.md 10.15, 10.16, 11.1"),
        Reader((11, 5), 25, 25, 13, "TensorRT OSS release 11.5"),
    ),
    "tensorrt_rtx": (
        Reader(
            (1, 4),
            22,
            28,
            13,
            "TensorRT-RTX 1.4 ONNX Conversion Guide: opset 9 to 22; 1.7.1.116 parses 23 to 28, "
            "measured 2026-11",
            # Before opset 23's Attention (10.14): the newest that its documents promise.
            operators=(10, 13),
        ),
    ),
    "ort": (Reader((1, 32), 25, 25, 13, "ONNX Runtime 1.32, measured 2026-11"),),
    "ort-cuda": (
        Reader(
            (1, 23),
            21,
            21,
            10,
            "ONNX Runtime 1.20 on reads opset 21; the version table of 1.23 was not found",
        ),
    ),
}

_TENSORRT_TYPES = frozenset(
    ("FLOAT", "FLOAT16", "BFLOAT16", "INT64", "INT32", "INT8", "INT4", "UINT8", "BOOL")
)
# A target's compute type -> its name in ONNX.
ONNX_COMPUTE = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}
# Element type -> the target's refusal that explains why it is missing.
REFUSED_TYPES = {
    **dict.fromkeys(("INT2", "UINT2"), "int2"),
    **dict.fromkeys(("FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ"), "fp8"),
    **dict.fromkeys(("FLOAT4E2M1", "FLOAT8E8M0"), "fp4"),
}


def oldest_version(target: Target) -> Version:
    """Return the oldest runtime version a target admits: ">=10.3,<10.8" -> (10, 3)."""
    found = re.search(r">=\s*(\d+(?:\.\d+)*)", target.runtime_versions)
    assert found is not None, f"target {target.name!r} needs a lower bound of its runtime"
    return tuple(int(part) for part in found[1].split("."))


def reader(target: Target) -> Reader:
    """Return the parser of the oldest runtime version a target admits."""
    oldest = oldest_version(target)
    return [entry for entry in READERS[target.runtime] if entry.since <= oldest][-1]


def operator_version(target: Target) -> Version:
    """Return the TensorRT version whose operators a TensorRT target certainly has."""
    return reader(target).operators or oldest_version(target)


def missing_type(dtype: str, target: Target) -> str | None:
    """Return why a target has no tensors of an ONNX element type; None if it has.

    Args:
        dtype: "FLOAT16"; empty if it is not known.
        target: whose refusals and runtime decide.
    """
    if not dtype:
        return None
    refusal = REFUSED_TYPES.get(dtype)
    if refusal in target.refusals:
        return target.refusals[str(refusal)]
    if is_tensorrt(target) and dtype not in _TENSORRT_TYPES:
        return f"TensorRT's types are {', '.join(sorted(_TENSORRT_TYPES))}"
    return None
