"""What a latency is predicted for: a bundle, a published geometry, a checkpoint's inputs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import isqrt
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from qvla_export.latency_model.flow_shape import (
    find_any_geometry,
    has_flow_tower,
    shape_of,
    with_prefix,
)
from qvla_export.latency_model.kernel_rates import DeviceRates
from qvla_export.latency_model.network_shape import NetworkShape, PolicyInputs
from qvla_export.latency_model.resnet_shape import has_resnet
from qvla_export.latency_model.roofline import LatencyModel, LatencyPrediction
from qvla_export.policies.families import recognize
from qvla_export.quantizer.layer_shapes import LayerShapes
from qvla_export.shared.artifacts import write_json
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.target import WIDTHS, ActivationSupport, Target

if TYPE_CHECKING:
    from qvla_export.allocation.allocate import LatencyLimit
    from qvla_export.allocation.setting import Setting
    from qvla_export.sensitivity.sensitivities import Sensitivities
    from qvla_export.shared.bundle import Bundle


@dataclass(frozen=True)
class Device:
    """Where it is predicted for."""

    target: Target
    # None for the target's modes, the fastest first.
    power_mode: str | None
    # File of `qvla bench rates`; takes the place of the target's own modes.
    rates: Path | None

    def models(self, network: NetworkShape) -> tuple[LatencyModel, ...]:
        """Return a model for each power mode asked for, the fastest first."""
        from engines.bench.kernel_rates import kernel_rates

        if self.rates is not None:
            measured = DeviceRates.load(self.rates)
            return (LatencyModel(network, self.target, measured.mode, measured.rates),)
        kernels = kernel_rates(self.target)
        modes = self.target.power_modes
        if self.power_mode is not None:
            modes = (self.target.power_mode(self.power_mode),)
        return tuple(LatencyModel(network, self.target, mode, kernels) for mode in modes)


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


@dataclass(frozen=True)
class PredictedAction:
    """An action's milliseconds in one power mode, in float or under the plan."""

    power_mode: str
    weights: Literal["float", "plan"]
    ms: float
    # Between which it is expected, see `LatencyPrediction.uncertainty`.
    low_ms: float
    high_ms: float
    # Part of the network -> its milliseconds.
    parts_ms: Mapping[str, float]

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_digits(ms)}" for name, ms in self.parts_ms.items())
        return (
            f"{self.power_mode:>6} {self.weights:>5}: predicted {_digits(self.ms)} ms "
            f"[{_digits(self.low_ms)}, {_digits(self.high_ms)}] = {parts}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "power_mode": self.power_mode,
            "weights": self.weights,
            "predicted_ms": self.ms,
            "low_ms": self.low_ms,
            "high_ms": self.high_ms,
            "stages_ms": dict(self.parts_ms),
        }


@dataclass(frozen=True)
class PredictionReport:
    """What an action is predicted to take; nothing of it is measured."""

    # Network, target and activations, in words.
    subject: str
    # Where the device's rates come from.
    rates: str
    rows: tuple[PredictedAction, ...]

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {"predicted": self.subject, "rows": [row.to_json() for row in self.rows]}

    def save(self, path: Path) -> None:
        """Write JSON, atomically."""
        write_json(path, self.to_json())

    def lines(self) -> Iterator[str]:
        """Yield a line a row, between what is predicted and what rates it comes from."""
        yield f"predicted, not measured: {self.subject}"
        yield from map(str, self.rows)
        yield f"rates: {self.rates}"


def predict_action(subject: Subject, device: Device) -> PredictionReport:
    """Predict an action's milliseconds from a roofline of the device, in float and planned.

    Raises:
        QvlaError: the target has no power mode of that name, or its rates are not known.
    """
    models = device.models(subject.network)
    rows = []
    for model in models:
        rows.append(_predicted_action(model, "float", model.predict()))
        planned = model.predict(subject.widths, subject.activations)
        rows.append(_predicted_action(model, "plan", planned))
    where = f"{subject.name} on {device.target.name}, activations {subject.activations}"
    return PredictionReport(where, models[0].rates.source, tuple(rows))


def _predicted_action(
    model: LatencyModel, weights: Literal["float", "plan"], predicted: LatencyPrediction
) -> PredictedAction:
    return PredictedAction(
        model.mode.name,
        weights,
        predicted.total_ms,
        predicted.total_ms / predicted.uncertainty,
        predicted.total_ms * predicted.uncertainty,
        {part.name: part.total_ms for part in predicted.parts},
    )


def _digits(ms: float) -> str:
    """Return three digits of small numbers: a small policy takes less than a millisecond."""
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def latency_limit(
    max_ms: float,
    device: Device,
    measured: "Sensitivities",
    setting: "Setting",
    policy: Path | None,
    preset: str | None,
) -> "LatencyLimit":
    """Return the limit that a planned setting must keep in the device's first power mode.

    Raises:
        QvlaError: the setting is not planned, or nothing says what the policy is given.
    """
    from qvla_export.allocation.allocate import LatencyLimit

    if setting.kind != "planned":
        raise QvlaError(f"setting {setting.name} has fixed widths; limit a planned one, such as w4")
    if policy is None:
        raise QvlaError(
            "--max-predicted-ms needs --policy, the checkpoint that says how many images a policy "
            "sees and how many actions it returns"
        )
    shapes = {n: (v.shape[1], measured.weights_per_channel[n]) for n, v in measured.values.items()}
    model = device.models(shape_of(shapes, recognize(policy).inputs(policy, preset)))[0]
    return LatencyLimit(max_ms, model, "int8" if setting.activation_bits else "none")


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
