"""The table of rules, each with its source. Operators: `engines.check.operators`."""

from engines.check.finding import Rule, Severity

_SPEC = "ONNX operator schemas of the imported operator set"
_HEADER = "NvInfer.h 11.1, IQuantizeLayer and IDequantizeLayer"
_RUNTIME_HEADER = "NvInferRuntimeBase.h 11.1, DataType"
_PARSER = "onnx-tensorrt release/10.1-GA, QuantDequantLinearHelper"
_OPERATORS = "onnx-tensorrt docs/operators.md 10.1, 10.16, 11.1; docs/Changelog.md to 10.15"
_WOQ = "TensorRT documentation 10.11: weight-only quantization is int4, in blocks, GEMM"
_RTX = "TensorRT-RTX 1.7.1.116, measured 2026-11"
_ORT = "ONNX Runtime 1.32, measured 2026-11"


# Rules of TensorRT's documents that TensorRT for RTX 1.7.1.116 does not hold to: its parser and
# builder took every graph that breaks one of them alone. `tests/engines/check` asks them again.
_RTX_BUILDS = frozenset(
    (
        "graph.output-type",
        "operator.runtime-version",
        "operator.opset",
        "quantization.scale-constant",
        "quantization.per-tensor-activations",
        "quantization.channel-axis",
        "quantization.between",
        "quantization.pairs",
        "quantization.input-type",
        "quantization.output-type",
    )
)


def _table(*rows: tuple[str, Severity, str]) -> dict[str, Rule]:
    return {
        name: Rule(name, severity, source, name in _RTX_BUILDS) for name, severity, source in rows
    }


RULES = _table(
    # The graph.
    ("graph.opset", "error", "ONNX release the parser is built with, see `runtimes.py`"),
    ("graph.opset-undocumented", "warning", "documented range of operator sets, `runtimes.py`"),
    ("graph.ir-version", "warning", "ONNX release the parser is built with, see `runtimes.py`"),
    ("graph.domain", "error", f"{_OPERATORS}: default domain; another one is looked up as plugin"),
    ("graph.untyped", "error", "ONNX type inference; a type that is not known cannot be checked"),
    ("graph.weights", "error", "ONNX external data: location, offset and length of a tensor"),
    ("graph.constant-shape", "error", "ONNX: value_info and initializer of one name agree"),
    ("graph.output-type", "error", "ONNX type inference of the graph's outputs"),
    # The bundle.
    ("bundle.target", "error", "DESIGN: a bundle for one target is not built for another"),
    ("bundle.contract", "error", "manifest.json: inputs and outputs of every part"),
    # Operators.
    ("operator.unsupported", "error", _OPERATORS),
    ("operator.unknown", "error", _OPERATORS),
    ("operator.runtime-version", "error", _OPERATORS),
    ("operator.opset", "error", _SPEC),
    ("operator.inputs", "error", _SPEC),
    ("operator.type", "error", _OPERATORS),
    ("operator.limit", "error", _OPERATORS),
    (
        "operator.equal-types",
        "error",
        f"{_SPEC}; strongly typed networks insert no casts (10.x and 11.x); {_RTX}: rejected",
    ),
    # Element types.
    ("type.missing", "error", _RUNTIME_HEADER),
    ("type.uint8", "error", f"{_OPERATORS}: UINT8 as network input or output only"),
    ("type.compute", "warning", "compute type of `engines.targets`, with its reason there"),
    # Quantization.
    ("quantization.scale-constant", "error", f"{_HEADER}: build-time constant"),
    ("quantization.scale-values", "error", f"{_HEADER}: strictly positive; {_RTX}: rejected"),
    (
        "quantization.scale-shape",
        "error",
        f"{_HEADER}; {_PARSER}: the block is inferred from the shapes, block_size is not read, so "
        "a last block that is not whole shifts all of them",
    ),
    ("quantization.scale-type", "error", f"{_HEADER}: HALF and BF16 scales match; {_RTX}"),
    ("quantization.symmetric", "error", f"{_HEADER}; {_PARSER}; {_RTX}: rejected"),
    (
        "quantization.int8-blocks",
        "error",
        f"{_HEADER}: blocks of INT4, FP8, FP4 only; {_RTX}: accepted, stored as float16",
    ),
    ("quantization.mixed-types", "error", f"{_RTX}: rejected, the layouts tried"),
    ("quantization.block-axis", "error", f"{_HEADER}: last or second-to-last dimension"),
    ("quantization.even-int4", "error", f"{_PARSER}: even last dimension; {_RTX}: else float16"),
    ("quantization.constant-weights", "error", f"{_HEADER}: per channel: IConstantLayer"),
    ("quantization.per-tensor-activations", "error", f"{_HEADER}: activations per tensor"),
    ("quantization.channel-axis", "error", f"{_PARSER}; {_RTX}: int4 is stored as float16"),
    (
        "quantization.between",
        "error",
        "TensorRT documentation, Explicit Quantization: DQ between weights and linear operator; "
        "NVIDIA/TensorRT issue 1604: a Transpose between them keeps them from fusing",
    ),
    ("quantization.pairs", "error", "TensorRT documentation, Explicit Quantization: Q/DQ pairs"),
    ("quantization.input-type", "error", f"{_HEADER}: the scale's type is the input's"),
    ("quantization.output-type", "error", f"{_PARSER}: without a zero point ONNX says uint8"),
    ("quantization.block-size", "warning", f"{_WOQ}; NVIDIA's int4 kernels take 64 or 128"),
    ("quantization.int4-per-channel", "warning", _WOQ),
    ("quantization.int8-weight-only", "warning", f"{_WOQ}; INT8 is documented as W8A8"),
    # ONNX Runtime.
    ("ort.int2-columns", "error", f"{_ORT}: other numbers of columns compute garbage"),
    ("ort.zero-point", "warning", f"{_ORT}: 23 instead of 2.1 ms for 300 x 2048 x 2048"),
    ("ort.unfused-scale", "warning", f"{_ORT}: DequantizeLinear and MatMul do not fuse"),
)
