"""The table of targets. What a container really costs was measured, not read from a data sheet."""

import difflib

from qvla_export.errors import QvlaError
from qvla_export.target import Container, Target

# ONNX Runtime 1.32 on a CPU (AVX2), measured 2026-11:
# - DequantizeLinear -> MatMul becomes MatMulNBits for 8, 4 and 2 bits, per channel and for blocks
#   of 16 to 256 along the input, if the scale is float32 when it reaches DequantizeLinear. A
#   float16 scale behind a Cast is folded at load and fuses as well, at half the bytes; a float16
#   scale straight into DequantizeLinear does not fuse.
# - INT2 needs opset 25. Opset 23's Attention is slower there: it is expanded into 20 nodes.
# - INT2 with a number of channels that is not a multiple of 4 computes garbage, silently;
#   `qvla_export.buckets_to_onnx` fills up with channels of zeros.
# - Blocks of 32, 64 and 128 run alike, so the block is a choice of accuracy per byte. Relative
#   error of 4-bit heavy-tailed (t, 4 degrees) weights: 0.119 with 32 (4.5 bits per weight, scales
#   included), 0.142 with 64 (4.25), 0.166 with 128 (4.12): a quarter bit buys what it costs.
CPU = Target(
    name="cpu",
    opset=25,
    ir_version=13,
    containers={
        0: Container(0, None, 0),
        2: Container(2, 64, 16),
        4: Container(4, 64, 16),
        8: Container(8, None, 32),
        16: Container(16, None, 0),
    },
)

TARGETS: dict[str, Target] = {target.name: target for target in (CPU,)}
# Target name -> the runtime that runs its bundles; see `engines.load`.
RUNTIMES: dict[str, str] = {"cpu": "ort"}


class UnknownTarget(QvlaError):
    """A target's name is not in the table."""


def find_target(name: str) -> Target:
    """Return a target by name.

    Raises:
        UnknownTarget: the message lists the names and the nearest.
    """
    if name not in TARGETS:
        nearest = difflib.get_close_matches(name, TARGETS, n=1, cutoff=0.0)[0]
        raise UnknownTarget(
            f"target {name!r} is unknown; there are {sorted(TARGETS)}. Did you mean {nearest!r}?"
        )
    return TARGETS[name]
