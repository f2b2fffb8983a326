"""The noun `Target`: what a device and its runtime really offer. Instances: `engines.targets`."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from qvla_export.shared.errors import QvlaError

WIDTHS = (0, 2, 4, 8, 16)

# ONNX Runtime's CPU and CUDA execution providers, OpenVINO, TensorRT, TensorRT for RTX,
# torch walking the graphs.
Runtime = Literal["ort", "ort-cuda", "openvino", "tensorrt", "tensorrt_rtx", "torch"]
# How an engine holds quantized weights. "packed": as they are stored, integers of rounded inputs
# expanded to int8. "unpacked": as float32. "tuned": each layer as `qvla tune` found best on this
# machine, packed where it was not run.
WeightForm = Literal["tuned", "packed", "unpacked"]
# Type of activations and of what a plan leaves at 16 bits, wherever the graph multiplies.
ComputeType = Literal["float32", "float16", "bfloat16"]
# "group": a float scale for every group of inputs. "two-level": one for every channel, and a whole
# number for every group.
ScaleForm = Literal["group", "two-level"]
# How a runtime multiplies codes. "dequantized": made numbers of the compute type, in or before a
# product for each width; 8-bit codes of rounded inputs as integers. "expanded": of rounded inputs,
# one product of int8 over all widths. "kernel": one of this project's own for all widths, which
# reads packed codes.
ProductForm = Literal["dequantized", "expanded", "kernel"]
# "none": activations stay in the compute type. "int8": one symmetric scale per tensor.
ActivationSupport = Literal["none", "int8"]


class UnsupportedOnTarget(QvlaError):
    """A target does not have what a plan, graph or user asks for; the message says why."""


@dataclass(frozen=True)
class Container:
    """How a target stores the weights of one width."""

    # Bits that one weight really occupies.
    bits: int
    # Weights along the input that share one scale; None for one scale per channel.
    group_size: int | None
    # Bits of one scale.
    scale_bits: int
    # Whether the runtime takes whole groups only: the input is filled up with zeros then.
    whole_groups: bool = False
    # Whether every scale has a zero point beside it, of as many bits as a weight.
    zero_points: bool = False
    # Whether a channel has one scale of `scale_bits`, and each group a multiple of it in 8 bits.
    two_level: bool = False

    def __post_init__(self) -> None:
        sizes = {"bits": (0, 32), "group_size": (1, 1 << 20), "scale_bits": (0, 64)}
        for name, (low, high) in sizes.items():
            value = getattr(self, name)
            if name == "group_size" and value is None:
                continue
            if type(value) is not int or not low <= value <= high:
                raise QvlaError(
                    f"{name} of a container must be a whole number from {low} to {high}, "
                    f"got {value!r:.80}"
                )

    def stored_inputs(self, inputs: int) -> int:
        """Return how many weights a channel of `inputs` weights is stored with."""
        if self.group_size is None or not self.whole_groups or self.is_expanded:
            return inputs
        return -(-inputs // self.group_size) * self.group_size

    def row_bits(self, inputs: int) -> int:
        """Return the stored bits of one channel with `inputs` weights, scales included."""
        if self.bits == 0:
            return 0
        return self.stored_inputs(inputs) * self.bits + self.step_bits(inputs)

    def step_bits(self, inputs: int) -> int:
        """Return the bits of one channel's scales, multipliers and zero points."""
        if self.two_level:
            return self.scale_bits + (0 if self.is_expanded else 8 * self.groups(inputs))
        return self.groups(inputs) * (self.scale_bits + (self.bits if self.zero_points else 0))

    def groups(self, inputs: int) -> int:
        """Return how many scales a channel of `inputs` weights has."""
        return 1 if self.group_size is None else -(-inputs // self.group_size)

    @property
    def is_expanded(self) -> bool:
        """Whether codes are stored times their multipliers: int8 numbers, one scale a channel."""
        return self.two_level and self.bits == 8


@dataclass(frozen=True)
class PowerMode:
    """What a device computes and reads per second in one power mode; for predictions only."""

    name: str
    # Memory bandwidth, GB/s (1e9 bytes).
    bandwidth_gb_s: float
    # Arithmetic ("float32", "float16", "int8") -> dense tera-operations per second, a
    # multiply-add counted as two.
    dense_tops: Mapping[str, float]


@dataclass(frozen=True)
class Target:
    """A device and runtime that a plan and a bundle are made for."""

    name: str
    runtime: Runtime
    # PEP 440 specifier of the runtime's versions that build and run its bundles.
    runtime_versions: str
    # ONNX operator set and IR version of the exported graph.
    opset: int
    ir_version: int
    # Width -> container; 0 is absent from the graph.
    containers: Mapping[int, Container]
    compute: ComputeType = "float32"
    activations: tuple[ActivationSupport, ...] = ("none", "int8")
    # Channels of a bucket come in multiples of this; see `qvla_export.allocation.alignment`.
    channel_multiple: int = 1
    # CUDA compute capability, "sm_87"; None on a CPU.
    compute_capability: str | None = None
    power_modes: tuple[PowerMode, ...] = ()
    # How its products may run -> by what, and how far that was taken.
    forms: Mapping[ProductForm, str] = field(default_factory=dict)
    # What users ask for and the target lacks -> why, with the source.
    refusals: Mapping[str, str] = field(default_factory=dict)

    def require(self, feature: str) -> None:
        """Refuse a feature the target lacks.

        Args:
            feature: a key of `refusals`: "fp8", "fp4", "zero points", "ranges of tokens".

        Raises:
            UnsupportedOnTarget: with the reason.
        """
        if feature in self.refusals:
            raise UnsupportedOnTarget(
                f"target {self.name!r} has no {feature}: {self.refusals[feature]}"
            )

    def with_zero_points(self) -> "Target":
        """Return this target with weights of 2, 4 and 8 bits that have zero points.

        Raises:
            UnsupportedOnTarget: it has none; with the reason.
        """
        self.require("zero points")
        stored = {
            bits: replace(container, zero_points=0 < bits < 16, two_level=False)
            for bits, container in self.containers.items()
        }
        return replace(self, containers=stored)

    def with_two_level_scales(self) -> "Target":
        """Return this target with one scale a channel and multiples of it for groups.

        Runtimes that take whole groups read no multipliers; they get codes that are expanded.

        Raises:
            UnsupportedOnTarget: it has none; with the reason.
        """
        self.require("two-level scales")
        stored = dict(self.containers)
        for bits, container in self.containers.items():
            if container.group_size is not None:
                kept = 8 if container.whole_groups else container.bits
                stored[bits] = replace(container, bits=kept, two_level=True, zero_points=False)
        return replace(self, containers=stored)

    def product_form(self, activations: ActivationSupport, two_level: bool) -> ProductForm:
        """Return the form in which its bundles run today, which plans are costed in.

        Args:
            activations: of the plan; "int8" where inputs are rounded.
            two_level: whether 2- and 4-bit codes expand to int8.
        """
        return "expanded" if activations == "int8" and two_level else "dequantized"

    def power_mode(self, name: str | None = None) -> PowerMode:
        """Return a power mode by name; the first, the device's fastest, for None.

        Raises:
            UnsupportedOnTarget: the target has none of this name; the message lists them.
        """
        for mode in self.power_modes:
            if name is None or mode.name == name:
                return mode
        raise UnsupportedOnTarget(
            f"target {self.name!r} has no power mode {name!r}; "
            f"it has {[mode.name for mode in self.power_modes]}"
        )
