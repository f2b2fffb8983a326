"""Packed weights: what the layers and buckets of a plan are stored as on a target. numpy only.

Three things make them differ from channels times width: hidden units that are constant leave
producers and consumer (`quantizer.coupling`), runtimes that want whole groups get inputs filled
up with zeros (by further units of the layer before it where that is coupled, else by a Pad), and
columns of 2 and 4 bits come in fours or pairs. `quantizer.plan_bytes` adds them up.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qvla_export.quantizer.coupling import Coupling, find_couplings
from qvla_export.quantizer.layer_names import parallel_group
from qvla_export.quantizer.quantize import QuantizerSpec, scale_form
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.target import Container, Target

Widths = Mapping[str, NDArray[np.int8]]
# ONNX Runtime 1.32 repacks INT2 columns four at a time and computes garbage otherwise.
_INT2_COLUMNS = 4
# TensorRT packs two int4 a byte and documents no row that ends within one.
_INT4_COLUMNS = 2


@dataclass(frozen=True)
class StoredLayer:
    """Layers that are stored as one, after coupling and filling."""

    # Names of its members, in the plan's order.
    names: tuple[str, ...]
    # Widths of all members' channels, filled-up ones included; 8 where codes are expanded.
    # int8 [channels]
    widths: NDArray[np.int8]
    # Channels of each member, filled-up ones included.
    sizes: tuple[int, ...]
    # Weights of a channel; more are stored in whole groups.
    inputs: int


def stored_columns(channels: int, container: Container) -> int:
    """Return how many channels a bucket is stored with; further ones are zeros."""
    multiple = 1
    if container.bits == 2:
        multiple = _INT2_COLUMNS
    elif container.bits == 4 and container.whole_groups:
        multiple = _INT4_COLUMNS
    return -(-channels // multiple) * multiple


def stored_inputs(
    inputs: int, widths: NDArray[np.int8], containers: Mapping[int, Container]
) -> int:
    """Return how many inputs the widest stored bucket of a layer reads.

    Args:
        inputs: weights of a channel.
        widths: int8 [channels] of all layers that share the input.
        containers: of the target.
    """
    used = [containers[bits] for bits in np.unique(widths).tolist() if bits]
    return max([inputs, *(container.stored_inputs(inputs) for container in used)])


def producer_widths(widths: Widths, coupling: Coupling, units: int) -> dict[str, NDArray[np.int8]]:
    """Return the widths of a coupling's producers as they are stored.

    Units of zeros that fill the consumer's groups up get the lowest width that occurs.

    Args:
        widths: layer name -> int8 [channels].
        coupling: of the layers.
        units: inputs that the consumer is stored with.

    Returns:
        Producer -> int8 [units].
    """
    kept = {name: widths[name][coupling.order] for name in coupling.producers}
    lowest = min(int(layer.min()) for layer in kept.values())
    missing = units - len(coupling.order)
    return {n: np.pad(layer, (0, missing), constant_values=lowest) for n, layer in kept.items()}


def stored_layers(
    widths: Widths, weights_per_channel: Mapping[str, int], containers: Mapping[int, Container]
) -> tuple[StoredLayer, ...]:
    """Return the layers that a target's graph holds.

    Args:
        widths: layer name -> int8 [channels].
        weights_per_channel: layer name -> weights of one channel.
        containers: of the target.
    """
    widths, inputs = dict(widths), dict(weights_per_channel)
    for coupling in find_couplings(widths, weights_per_channel):
        units = stored_inputs(len(coupling.order), widths[coupling.consumer], containers)
        inputs[coupling.consumer] = units
        widths |= producer_widths(widths, coupling, units)
    layers = []
    for names in parallel_layers(widths, weights_per_channel):
        joined = joined_widths(np.concatenate([widths[name] for name in names]), containers)
        sizes = tuple(len(widths[name]) for name in names)
        layers.append(StoredLayer(names, joined, sizes, inputs[names[0]]))
    return tuple(layers)


def joined_widths(
    widths: NDArray[np.int8], containers: Mapping[int, Container]
) -> NDArray[np.int8]:
    """Return the widths under which channels are stored: 8 where their codes are expanded."""
    expanded = [bits for bits, container in containers.items() if container.is_expanded]
    return np.where(np.isin(widths, expanded), np.int8(8), widths)


def takes_whole_groups(containers: Mapping[int, Container]) -> bool:
    """Say whether it is TensorRT's kind of runtime that reads the containers.

    It takes whole groups of inputs and gains by merging all layers of an input. ONNX Runtime on a
    CPU does neither: a test holds it for all targets.
    """
    return any(container.whole_groups for container in containers.values())


def one_width_apart(
    widths: Iterable[NDArray[np.int8]], containers: Mapping[int, Container]
) -> bool:
    """Say whether layers of one input stay apart: ONNX Runtime, and one width in all.

    The Split behind them costs more there than one larger product saves: 8 layers of 1024 and 300
    tokens at 8 bits took 231 ms merged, 152 ms apart (ONNX Runtime 1.32, one thread). 2 bits are
    stored in fours, so they do not count.
    """
    found = set(np.unique(np.concatenate(list(widths))).tolist())
    return not takes_whole_groups(containers) and len(found) == 1 and not found & {0, 2}


def side_by_side(
    bits: Iterable[int], inputs: int, containers: Mapping[int, Container], rounded_inputs: bool
) -> bool:
    """Say whether a layer's codes of all widths are expanded to one matrix of integers at load.

    So they are where ONNX Runtime reads rounded inputs and every channel has one scale.
    """
    used = [containers[width] for width in bits if width not in (0, 16)]
    return (
        rounded_inputs
        and not takes_whole_groups(containers)
        and len(used) > 0
        and all((c.two_level or c.groups(inputs) == 1) and not c.zero_points for c in used)
    )


def stored_on(target: Target, spec: QuantizerSpec) -> Target:
    """Return a target that stores the zero points or the scales of two levels of a quantizer.

    Raises:
        UnsupportedOnTarget: the target has none; with the reason.
    """
    if any(rule.zero_points for rule in spec.rules.values()):
        return target.with_zero_points()
    if scale_form(spec) == "two-level":
        return target.with_two_level_scales()
    return target


def require_steps_of(containers: Mapping[int, Container], spec: QuantizerSpec) -> None:
    """Refuse containers that store other zero points or levels of scales than a quantizer makes.

    Raises:
        QvlaError: naming the widths of both.
    """
    for name, words in (("zero_points", "zero points"), ("two_level", "two levels of scales")):
        stored = sorted(bits for bits, held in containers.items() if getattr(held, name))
        made = sorted(bits for bits, rule in spec.rules.items() if getattr(rule, name))
        if stored != made:
            raise QvlaError(
                f"the quantizer makes {words} of {made} bits, the containers store those of "
                f"{stored}; they must agree: qvla sensitivities and plan for the same target"
            )


def bucket_bytes(channels: int, inputs: int, container: Container) -> int:
    """Return the bytes of one bucket's codes and of what they stand for, for a number of inputs.

    Scales, and zero points or multipliers where the container has them.
    """
    columns = stored_columns(channels, container)
    codes = -(-columns * container.stored_inputs(inputs) * container.bits // 8)
    steps = columns * container.groups(inputs)
    if container.two_level:
        factors = 0 if container.is_expanded else steps
        return codes + factors + columns * container.scale_bits // 8
    zeros = -(-steps * container.bits // 8) if container.zero_points else 0
    return codes + steps * container.scale_bits // 8 + zeros


def parallel_layers(
    names: Iterable[str], weights_per_channel: Mapping[str, int]
) -> tuple[tuple[str, ...], ...]:
    """Group layers by name as their graph merges them; most are alone."""
    groups: dict[tuple[str, int], list[str]] = {}
    for name in names:
        groups.setdefault((parallel_group(name), weights_per_channel[name]), []).append(name)
    return tuple(tuple(group) for group in groups.values())
