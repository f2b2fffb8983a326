"""Operators of TensorRT's ONNX parser that a policy's graph can contain, with types and limits.

Facts of onnx-tensorrt docs/operators.md at 10.1 (release/10.1-GA), 10.16 (6bde659) and 11.1
(7c51a63), and of docs/Changelog.md for the versions between, unless `source` says otherwise.
"""

from dataclasses import dataclass, replace

from engines.check.runtimes import Version

_FLOATS = ("FLOAT", "FLOAT16", "BFLOAT16")
_NUMBERS = (*_FLOATS, "INT32", "INT64")
_ANY = (*_NUMBERS, "BOOL")
_CASTS = (*_ANY, "UINT8")
_TABLE = "onnx-tensorrt docs/operators.md"
_CHANGES = "onnx-tensorrt docs/Changelog.md"
_MEASURED = "TensorRT-RTX 1.7.1.116, measured 2026-11"


@dataclass(frozen=True)
class Limit:
    """What the parser does not take of an operator, until a version or always."""

    # "constant": input `index` is a constant if given. "given or static": input `index` is given
    # unless the sizes of the first are known.
    # "int64 or steps": input `index` is INT64 unless Slice's steps are given.
    # "floats": input `index` is floating point. "one output". "rank": of input `index`.
    # "attribute": `name` has one of `values`. "ones": all numbers of attribute `name` are 1.
    # "false": input `index` is a constant, and false, if given.
    kind: str
    source: str
    index: int = 0
    name: str = ""
    values: tuple[str | int, ...] = ()
    # First version without the limit.
    until: Version | None = None

    def holds(self, version: Version) -> bool:
        """Say whether a runtime version has this limit."""
        return self.until is None or version < self.until


@dataclass(frozen=True)
class Operator:
    """One operator of the parser."""

    name: str
    # Element types of input `data`.
    types: tuple[str, ...]
    data: int = 0
    # First TensorRT version that has it.
    since: Version = (10, 0)
    limits: tuple[Limit, ...] = ()
    source: str = f"{_TABLE} 10.1, 10.16, 11.1"


def _rows(names: str, types: tuple[str, ...], *limits: Limit) -> list[Operator]:
    return [Operator(name, types, limits=limits) for name in names.split()]


def _constant(index: int, source: str = _TABLE, until: Version | None = None) -> Limit:
    return Limit("constant", source, index, until=until)


# Two or three places beside batch and channels.
_POOLED = Limit("rank", f"{_TABLE} 10.1: 2D or 3D pooling only", values=(4, 5))
_DENSE = Limit("ones", f"{_TABLE} 10.1", name="dilations")
_ONE_OUTPUT = Limit("one output", f"{_TABLE} 11.1: only the first output")

_OPERATORS = [
    *_rows("Abs Add Div Max Mean Min Mod Mul Neg Sign Sub Sum Equal Greater Less", _NUMBERS),
    *_rows("GreaterOrEqual LessOrEqual Relu Range IsNaN", _NUMBERS),
    *_rows("Ceil Clip Cos Elu Erf Exp Floor HardSigmoid HardSwish Identity LeakyRelu", _FLOATS),
    *_rows("Log LogSoftmax Reciprocal Round Sigmoid Sin Softmax Softplus Softsign", _FLOATS),
    *_rows("Sqrt Tan Tanh Conv ConvTranspose Gemm MatMul PRelu", _FLOATS),
    *_rows("GlobalAveragePool BatchNormalization InstanceNormalization", _FLOATS),
    *_rows("MaxPool", _FLOATS, _ONE_OUTPUT, _POOLED, _DENSE),
    *_rows("And Not Or Xor", ("BOOL",)),
    *_rows("Concat Expand Flatten Gather GatherElements GatherND", _ANY),
    *_rows("Reshape Shape Size Split Tile Transpose Trilu", _ANY),
    *_rows("Slice", _ANY, Limit("int64 or steps", _MEASURED, 1)),
    *_rows("Constant", (*_ANY, "INT4", "INT8")),
    *_rows("ConstantOfShape", ("INT64",)),
    *_rows("Cast", _CASTS, Limit("attribute", _TABLE, name="to", values=_CASTS)),
    *_rows(
        "Gelu", _FLOATS, Limit("attribute", _TABLE, name="approximate", values=("none", "tanh"))
    ),
    *_rows("LayerNormalization", _FLOATS, _ONE_OUTPUT),
    *_rows("ArgMax ArgMin", _NUMBERS),
    *_rows("TopK", _NUMBERS, Limit("attribute", _TABLE, name="sorted", values=(1,))),
    *_rows("CumSum", _FLOATS, _constant(1)),
    *_rows("OneHot", _NUMBERS, _constant(1)),
    *_rows("ReduceL1 ReduceL2 ReduceMax ReduceMean ReduceMin ReduceProd", _NUMBERS, _constant(1)),
    *_rows("ReduceSum ReduceSumSquare ReduceLogSum ReduceLogSumExp", _NUMBERS, _constant(1)),
    *_rows("Unsqueeze", _ANY, _constant(1)),
    *_rows(
        "Squeeze",
        _ANY,
        _constant(1),
        Limit("given or static", "onnx-tensorrt release/10.1-GA, Squeeze importer", 1),
    ),
    *_rows("Pad", _NUMBERS, _constant(3, f"{_TABLE} 10.1; {_CHANGES} 10.4", until=(10, 4))),
    *_rows(
        "Pow",
        _NUMBERS,
        Limit("floats", f"{_CHANGES} 10.12: integer bases", 0, until=(10, 12)),
        Limit("floats", f"{_CHANGES} 10.8: integer exponents", 1, until=(10, 8)),
    ),
    *_rows("ScatterElements", _NUMBERS),
    *_rows("ScatterND", _NUMBERS, Limit("attribute", _TABLE, name="reduction", values=("none",))),
    *_rows(
        "Resize",
        _FLOATS,
        Limit("attribute", _TABLE, name="antialias", values=(0,)),
        Limit("attribute", _TABLE, name="mode", values=("nearest", "linear")),
    ),
    *(
        replace(operator, source=f"{_TABLE} 10.1; {_MEASURED}")
        for operator in (
            *_rows("Acos Acosh Asin Asinh Atan Atanh Celu Cosh Einsum LRN Selu", _FLOATS),
            *_rows("Sinh ThresholdedRelu LpNormalization GroupNormalization Hardmax", _FLOATS),
            *_rows("IsInf MeanVarianceNormalization GlobalLpPool GlobalMaxPool", _FLOATS),
            *_rows("AveragePool", _FLOATS, _POOLED, _DENSE),
            *_rows("LpPool", _FLOATS, replace(_POOLED, source=_MEASURED), _DENSE),
            *_rows("Dropout", _FLOATS, Limit("false", f"{_TABLE} 10.1: not in training", 2)),
            *_rows("Mish", ("FLOAT", "FLOAT16")),
            *_rows("DepthToSpace Shrink SpaceToDepth", _NUMBERS),
        )
    ),
    Operator("Where", _ANY, data=1),
    Operator("QuantizeLinear", _FLOATS),
    Operator("DequantizeLinear", ("INT8", "INT4")),
    Operator(
        "Attention",
        _FLOATS,
        since=(10, 14),
        limits=(_ONE_OUTPUT, Limit("rank", f"{_TABLE} 11.1", values=(4,))),
        source=f"{_CHANGES} 10.14; {_TABLE} 11.1",
    ),
    Operator("RMSNormalization", _FLOATS, since=(10, 15), source=f"{_CHANGES} 10.15"),
    Operator("RotaryEmbedding", _FLOATS, since=(10, 15), source=f"{_CHANGES} 10.15"),
    Operator("Swish", _FLOATS, since=(11, 0), source="TensorRT OSS CHANGELOG.md 11.0"),
]
OPERATORS = {operator.name: operator for operator in _OPERATORS}
OPERATORS["Identity"] = replace(OPERATORS["Identity"], types=_ANY)

# What a policy's exporter or another quantizer may write instead, and what to write.
_SEQUENCES = "tensors: unroll the loop or stack them before export"
UNSUPPORTED = {
    "DynamicQuantizeLinear": "QuantizeLinear with a constant scale, calibrated on observations",
    "MatMulInteger": "DequantizeLinear on both inputs of a MatMul",
    "ConvInteger": "DequantizeLinear on both inputs of a Conv",
    "QLinearMatMul": "QuantizeLinear and DequantizeLinear around a MatMul",
    "QLinearConv": "QuantizeLinear and DequantizeLinear around a Conv",
    "BitShift": "int4 constants, which are packed already",
    "BitwiseAnd": "int4 constants, which are packed already",
    "BitwiseOr": "int4 constants, which are packed already",
    "BitwiseNot": "int4 constants, which are packed already",
    "BitwiseXor": "int4 constants, which are packed already",
    "Compress": "Gather with constant indices",
    "Unique": "Gather with constant indices",
    "Bernoulli": "a random tensor as graph input",
    "Multinomial": "a random tensor as graph input",
    "Col2Im": "Reshape and Transpose",
    "CenterCropPad": "Slice and Pad",
    "AffineGrid": "a constant grid",
    "MaxUnpool": "Resize",
    **dict.fromkeys(("SequenceAt", "SequenceConstruct", "SequenceEmpty"), _SEQUENCES),
    **dict.fromkeys(("SequenceInsert", "SplitToSequence", "ConcatFromSequence"), _SEQUENCES),
    **dict.fromkeys(("Optional", "OptionalGetElement", "OptionalHasElement"), _SEQUENCES),
}
# Of an operator that its runtime's oldest version lacks.
OLDER = {
    "Attention": "MatMul, Softmax and MatMul (export at opset 21)",
    "RMSNormalization": "Pow, ReduceMean, Add, Sqrt, Reciprocal and Mul (export at opset 21)",
    "RotaryEmbedding": "Mul, Neg, Slice, Concat and Add (export at opset 21)",
    "Swish": "Sigmoid and Mul",
}
