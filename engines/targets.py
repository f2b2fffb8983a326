"""The table of targets. What a container really costs was measured, not read from a data sheet."""

import difflib
from dataclasses import replace

from qvla_export.shared.errors import QvlaError
from qvla_export.shared.target import Container, PowerMode, ScaleForm, Target

# ONNX Runtime 1.32 on a CPU (AVX2), measured 2026-11:
# - DequantizeLinear -> MatMul becomes MatMulNBits for 8, 4 and 2 bits, per channel and for blocks
#   of 16 to 256 along the input, if the scale is float32 when it reaches DequantizeLinear. A
#   float16 scale behind a Cast is folded at load and fuses as well, at half the bytes; a float16
#   scale straight into DequantizeLinear does not fuse.
# - INT2 needs opset 25. Opset 23's Attention is slower there: it is expanded into 20 nodes.
# - INT2 with a number of channels that is not a multiple of 4 computes garbage, silently;
#   `qvla_export.graph.buckets_to_onnx` fills up with channels of zeros.
# - Zero points fuse as well and give the right numbers at accuracy level 0, for any number of
#   channels and inputs (int2: channels in fours); with 8-bit activations too.
# - Blocks of 32, 64 and 128 run alike, so the block is a choice of accuracy per byte. Relative
#   error of 4-bit heavy-tailed (t, 4 degrees) weights: 0.119 with 32 (4.5 bits per weight, scales
#   included), 0.142 with 64 (4.25), 0.166 with 128 (4.12): a quarter bit buys what it costs.
CPU = Target(
    name="cpu",
    runtime="ort",
    runtime_versions=">=1.32",
    opset=25,
    ir_version=13,
    containers={
        0: Container(0, None, 0),
        2: Container(2, 64, 16),
        4: Container(4, 64, 16),
        8: Container(8, None, 32),
        16: Container(16, None, 0),
    },
    forms={
        "dequantized": "ONNX Runtime, MatMulNBits on packed codes",
        "expanded": "ONNX Runtime, one int8 product a layer (two-level scales, rounded inputs)",
    },
    refusals={
        "fp8": "ONNX Runtime's CPU kernels multiply no fp8 (operator tables of 1.32)",
        "fp4": "ONNX Runtime's CPU kernels multiply no fp4 (operator tables of 1.32)",
    },
)

# float16, not bfloat16: equally fast on sm_87 and sm_89, and its 11 bits of precision move actions
# an eighth as much as bfloat16's 8. Its range is enough where norms and softmax stay in float32
# (`graph.passes.compute_type`). 8-bit scales are one a channel, 4-bit scales one a block of
# 128 inputs, the block of NVIDIA's own int4 kernels. No 2-bit type exists: 2 bits cost 4.
# TensorRT-RTX 1.7 parses whole blocks only and refuses int4 tensors of odd size (measured 2026-11).
# 32 channels of 4 bits are the 16 bytes that a vectorized load reads.
_INT4 = Container(4, 128, 16, whole_groups=True)
_TENSORRT = Target(
    name="tensorrt",
    runtime="tensorrt",
    runtime_versions=">=10.3",
    # The lowest operator set with int4 and blocked DequantizeLinear, so that every version parses.
    opset=21,
    ir_version=10,
    containers={
        0: Container(0, None, 0),
        2: _INT4,
        4: _INT4,
        8: Container(8, None, 16),
        16: Container(16, None, 0),
    },
    compute="float16",
    channel_multiple=32,
    forms={
        "dequantized": "TensorRT, int4 codes behind float16 products, a MatMul a width; built in "
        "CI for RTX, run nowhere",
        "expanded": "TensorRT, one int8 product of all widths, Q/DQ as plain ONNX (--scales "
        "two-level, rounded inputs); built in CI for RTX, run nowhere",
        "kernel": "this project's Triton kernels under torch; in no TensorRT engine",
    },
    refusals={
        "ranges of tokens": "no engine of its ran a product whose rows are multiplied behind it; "
        "target cpu has them; take another --activations-method",
        "zero points": "TensorRT quantizes symmetrically, a zero point must be all zeros "
        "(IDequantizeLayer, NvInfer.h 11.1)",
        "int2": "TensorRT's DataType has no 2-bit type (NvInferRuntimeBase.h 11.1); "
        "2-bit channels are stored in int4",
        "int8 blocks": "blocks along the input exist for int4, fp8 and fp4 only "
        "(IDequantizeLayer, NvInfer.h 11.1)",
    },
)
_NO_FP8 = (
    "sm_87 has no fp8 or fp4 arithmetic; fp8 needs sm_89, fp4 sm_100 (TensorRT support matrix)"
)
_NO_FP4 = "fp4 matrix products need sm_100 or later (TensorRT support matrix)"

# Memory and dense tensor-core rates of nvpmodel's modes: nvpmodel_p3701_0000.conf (64 GB module),
# 256 FP16 and 512 INT8 multiply-adds a clock and tensor core, 4 tensor cores an SM. float32 is the
# CUDA cores' 128 a clock and SM.
ORIN_MODES = (
    PowerMode("MAXN", 204.8, {"float32": 5.3, "float16": 42.5, "int8": 85.0}),
    PowerMode("50W", 204.8, {"float32": 3.3, "float16": 26.7, "int8": 53.4}),
    PowerMode("30W", 204.8, {"float32": 1.25, "float16": 10.0, "int8": 20.0}),
    PowerMode("15W", 136.5, {"float32": 0.63, "float16": 5.0, "int8": 10.0}),
)

RTX4070 = replace(
    _TENSORRT,
    name="rtx4070",
    runtime="tensorrt_rtx",
    runtime_versions=">=1.4",
    compute_capability="sm_89",
    # AD104: 46 SM at 2475 MHz, 504 GB/s; float16 with float32 accumulation.
    power_modes=(PowerMode("200W", 504.0, {"float32": 29.1, "float16": 58.3, "int8": 233.0}),),
    refusals={
        **_TENSORRT.refusals,
        "fp8": "sm_89 has it, but this project packs no fp8 weights or activations",
        "fp4": _NO_FP4,
    },
)
# JetPack 7.2: TensorRT 10.16, or 11.4.1 from 7.2.2 on.
ORIN_JP7 = replace(
    _TENSORRT,
    name="orin-jp7",
    runtime_versions=">=10.13",
    compute_capability="sm_87",
    power_modes=ORIN_MODES,
    refusals={**_TENSORRT.refusals, "fp8": _NO_FP8, "fp4": _NO_FP8},
)
# JetPack 6.1 and 6.2: TensorRT 10.3, 10.7 at most. Best effort: NVIDIA's own GR00T N1.7 backbone
# does not build there.
ORIN_JP6 = replace(
    ORIN_JP7,
    name="orin-jp6",
    runtime_versions=">=10.3,<10.8",
)
# ONNX Runtime's CUDA execution provider, best effort: never run here. It has no 2-bit kernels.
CUDA = replace(
    _TENSORRT,
    name="cuda",
    runtime="ort-cuda",
    runtime_versions=">=1.23",
    channel_multiple=1,
    forms={"dequantized": "ONNX Runtime's CUDA provider, float16 products; run nowhere"},
    refusals={
        "ranges of tokens": _TENSORRT.refusals["ranges of tokens"],
        "zero points": "this project never ran ONNX Runtime's CUDA kernels with them; target cpu "
        "has them",
        "two-level scales": "this project never ran ONNX Runtime's CUDA kernels with them; targets "
        "cpu, rtx4070 and orin-jp7 have them",
        "int2": "ONNX Runtime's CUDA DequantizeLinear takes 4 and 8 bits; "
        "2-bit channels are stored in int4",
        "fp8": "this project packs no fp8 weights or activations",
        "fp4": "ONNX Runtime's CUDA execution provider has no fp4 matrix product",
    },
)

TARGETS: dict[str, Target] = {
    target.name: target for target in (CPU, CUDA, RTX4070, ORIN_JP7, ORIN_JP6)
}


class UnknownTarget(QvlaError):
    """A target's name is not in the table."""


def find_target(name: str, zero_points: bool = False, scales: ScaleForm = "group") -> Target:
    """Return a target by name.

    Args:
        name: a key of `TARGETS`.
        zero_points: whether its weights have zero points beside their scales.
        scales: "group": every group of inputs has one of its own. "two-level": a channel has one,
            its groups whole multiples of it.

    Raises:
        UnknownTarget: the message lists the names and the nearest.
        UnsupportedOnTarget: it has no zero points or scales of two levels; with the reason.
        QvlaError: zero points beside scales of two levels.
    """
    if name not in TARGETS:
        nearest = difflib.get_close_matches(name, TARGETS, n=1, cutoff=0.0)[0]
        raise UnknownTarget(
            f"target {name!r} is unknown; there are {sorted(TARGETS)}. Did you mean {nearest!r}?"
        )
    if zero_points and scales == "two-level":
        raise QvlaError(
            "--zero-points go with a scale for every group, so not with --scales two-level: a code "
            "less its zero point, times a multiplier, is no int8 number; leave one of them out"
        )
    if scales == "two-level":
        return TARGETS[name].with_two_level_scales()
    return TARGETS[name].with_zero_points() if zero_points else TARGETS[name]
