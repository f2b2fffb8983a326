"""The noun `Subject`: what a latency is predicted for, a bundle or a published geometry."""

from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from qvla_export.latency_model.flow_shape import (
    find_any_geometry,
    has_flow_tower,
    shape_of,
    with_prefix,
)
from qvla_export.latency_model.network_shape import NetworkShape, PolicyInputs
from qvla_export.latency_model.resnet_shape import has_resnet
from qvla_export.quantizer.layer_shapes import LayerShapes
from qvla_export.quantizer.quantize import scale_form
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.target import WIDTHS, ActivationSupport

if TYPE_CHECKING:
    from qvla_export.shared.bundle import Bundle


@dataclass(frozen=True)
class Subject:
    """A network and the plan it is predicted under."""

    name: str
    network: NetworkShape
    # Layer name -> int8 [channels].
    widths: dict[str, NDArray[np.int8]]
    activations: ActivationSupport
    # Name of the target it is for; None where it is for any.
    target: str | None
    # Whether its 2- and 4-bit codes expand to int8.
    two_level: bool = False


def subject_of_bundle(path: Path) -> Subject:
    """Return a quantized bundle's network and plan.

    Raises:
        QvlaError: it is a float bundle.
    """
    from qvla_export.quantizer.plan import BitPlan
    from qvla_export.shared.bundle import PLAN, Bundle

    bundle = Bundle.load(path)
    if bundle.plan is None:
        raise QvlaError(
            f"{path} is a float bundle, which does not list its layers; give a quantized bundle "
            "of the same policy: its prediction shows float beside it"
        )
    plan = BitPlan.load(path / PLAN)
    return Subject(
        str(path),
        shape_of(plan.shapes, _inputs_of(bundle, plan.shapes)),
        dict(plan.widths),
        "none" if plan.activations is None else "int8",
        plan.target,
        scale_form(plan.quantizer) == "two-level",
    )


def _inputs_of(bundle: "Bundle", shapes: LayerShapes) -> PolicyInputs:
    """Return what a bundle's manifest says of the rows of its layers."""
    spec, steps = bundle.processor.spec, max(run.times for run in bundle.program.runs)
    prompt = bundle.golden().feeds[0].get("input_ids")
    height, width = spec.frame_size
    inputs = PolicyInputs(
        images=len(spec.cameras),
        image_size=width if has_resnet(shapes) else isqrt(spec.pixels),
        image_height=height if has_resnet(shapes) else 0,
        prompt_tokens=0 if prompt is None else prompt.shape[1],
        horizon=spec.horizon,
        action_dim=spec.action_dim,
        # A state that is in the prompt is no token of its own.
        state_dim=0 if spec.state_bins else spec.state_dim,
        head="tokens" if spec.action_bins else "l1",
    )
    if has_flow_tower(shapes):
        assert spec.noise is not None
        adaptive, action_width = bool(spec.state_bins), spec.noise.shape[-1]
        inputs = replace(inputs, flow_steps=steps, action_width=action_width, adaptive=adaptive)
        return with_prefix(inputs, shapes, _prefix_places(bundle))
    if spec.noise is not None:
        return replace(inputs, head="diffusion", denoising_steps=steps)
    if any(run.name == "decode" for run in bundle.program.runs):
        # The pass over the prompt makes the first token.
        head: Literal["tokens", "latent"] = "tokens" if spec.action_bins else "latent"
        latent = 0 if spec.action_bins else steps + 1
        return replace(
            inputs,
            head=head,
            autoregressive=True,
            latent_tokens=latent,
            vocab_size=spec.action_bins or inputs.vocab_size,
        )
    return inputs


def _prefix_places(bundle: "Bundle") -> int:
    """Places of a prefix beside those of the prompt: what is added to its axis of any size."""
    sizes = [size for part in bundle.parts for spec in part.outputs for size in spec.shape]
    added = [str(size).partition("+")[2] for size in sizes if str(size).startswith("prompt+")]
    return int(added[0]) if added else 0


def subject_of_geometry(name: str, bits: str, activations: ActivationSupport) -> Subject:
    """Return a published geometry with the same shares of widths in every layer."""
    geometry = find_any_geometry(name)
    shares = _shares(bits)
    widths = {}
    for layer, (channels, _) in geometry.layers.items():
        # Equal places in every layer, so that gate and up prune the same units.
        stops = np.rint(np.cumsum(list(shares.values())) * channels).astype(int)
        widths[layer] = np.repeat(np.array(list(shares), np.int8), np.diff(stops, prepend=0))
    return Subject(f"{name}, {bits} bits", geometry.network, widths, activations, None)


def _shares(text: str) -> dict[int, float]:
    """Read "4" or "8:0.3,4:0.7": width -> share of the channels."""
    try:
        pairs = [part.partition(":") for part in text.split(",")]
        shares = {int(width): float(share or 1) for width, _, share in pairs}
    except ValueError:
        shares = {}
    known = set(shares) <= set(WIDTHS) and all(share >= 0 for share in shares.values())
    if not shares or not known or abs(sum(shares.values()) - 1) > 1e-6:
        raise QvlaError(
            f"--bits is one of {WIDTHS} or shares that add up to 1, such as 8:0.3,4:0.6,0:0.1; "
            f"got {text!r}"
        )
    return shares
