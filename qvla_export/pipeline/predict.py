"""The step that predicts an action's latency on a device, in float and under a plan."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from qvla_export.latency_model.flow_shape import shape_of
from qvla_export.latency_model.kernel_rates import DeviceRates
from qvla_export.latency_model.network_shape import NetworkShape
from qvla_export.latency_model.roofline import LatencyModel, LatencyPrediction
from qvla_export.pipeline.sizing.subject import Subject
from qvla_export.policies.families import recognize
from qvla_export.quantizer.quantize import scale_form
from qvla_export.shared.artifacts import write_json
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.target import ActivationSupport, ProductForm, Target

if TYPE_CHECKING:
    from engines.bench.published_actions import PublishedAction
    from qvla_export.allocation.allocate import LatencyLimit
    from qvla_export.allocation.setting import Setting
    from qvla_export.sensitivity.sensitivities import Sensitivities


@dataclass(frozen=True)
class Device:
    """Where it is predicted for."""

    target: Target
    # None for the target's modes, the fastest first.
    power_mode: str | None
    # File of `qvla bench rates`; takes the place of the target's own modes.
    rates: Path | None

    def models(
        self, network: NetworkShape, form: ProductForm = "dequantized"
    ) -> tuple[LatencyModel, ...]:
        """Return a model for each power mode asked for, the fastest first.

        Args:
            network: what is predicted.
            form: in which planned layers run.
        """
        from engines.bench.kernel_rates import kernel_rates

        if self.rates is not None:
            measured = DeviceRates.load(self.rates)
            return (LatencyModel(network, self.target, measured.mode, measured.rates, form),)
        kernels = kernel_rates(self.target)
        modes = self.target.power_modes
        if self.power_mode is not None:
            modes = (self.target.power_mode(self.power_mode),)
        return tuple(LatencyModel(network, self.target, mode, kernels, form) for mode in modes)


@dataclass(frozen=True)
class PredictedAction:
    """An action's milliseconds in one power mode, in float or under the plan."""

    power_mode: str
    weights: Literal["float", "plan"]
    # How the plan's products run; "float" of the float graph.
    form: ProductForm | Literal["float"]
    # Of the planned layers in memory.
    weight_bytes: float
    # Against the float graph's on the same device: what precision and pruning are worth.
    float_share: float
    ms: float
    # Between which it is expected, see `LatencyPrediction.uncertainty`.
    low_ms: float
    high_ms: float
    # Part of the network -> its milliseconds.
    parts_ms: Mapping[str, float]

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_digits(ms)}" for name, ms in self.parts_ms.items())
        return (
            f"{self.power_mode:>6} {self.form:>11}: predicted {_digits(self.ms)} ms "
            f"[{_digits(self.low_ms)}, {_digits(self.high_ms)}], {self.float_share:.2f} of "
            f"float's, layers {_digits(self.weight_bytes / 1e6)} MB = {parts}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "power_mode": self.power_mode,
            "weights": self.weights,
            "form": self.form,
            "weight_bytes": round(self.weight_bytes),
            "float_share": self.float_share,
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
    # The form in which bundles of the target run in this version.
    today: ProductForm
    # Form -> by what it runs on the target, and how far that was taken.
    forms: Mapping[ProductForm, str]
    # Of other policies and runtimes on the same device.
    published: "tuple[PublishedAction, ...]"

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "predicted": self.subject,
            "rows": [row.to_json() for row in self.rows],
            "runs_today": self.today,
            "forms": dict(self.forms),
            "published": [asdict(action) for action in self.published],
        }

    def save(self, path: Path) -> None:
        """Write JSON, atomically."""
        write_json(path, self.to_json())

    def lines(self) -> Iterator[str]:
        """Yield a line a row, between what is predicted and what rates it comes from."""
        yield f"predicted, not measured: {self.subject}"
        yield from map(str, self.rows)
        for form, means in self.forms.items():
            yield f"{form}{' (bundles today)' if form == self.today else ''}: {means}"
        yield from map(str, self.published)
        yield f"rates: {self.rates}"


def predict_action(subject: Subject, device: Device) -> PredictionReport:
    """Predict an action's milliseconds from a roofline of the device, in float and planned.

    Raises:
        QvlaError: the target has no power mode of that name, or its rates are not known.
    """
    from engines.bench.published_actions import published_actions

    rounded = subject.activations == "int8"
    forms = {
        form: means for form, means in device.target.forms.items() if rounded or form != "expanded"
    }
    by_form = {form: device.models(subject.network, form) for form in forms}
    rows = []
    for index, model in enumerate(by_form["dequantized"]):
        plain = model.predict()
        floats = {name: np.full(len(w), 16, np.int8) for name, w in subject.widths.items()}
        rows.append(_predicted_action(model, "float", plain, model.weight_bytes(floats), plain))
        for form, models in by_form.items():
            own = models[index]
            planned = own.predict(subject.widths, subject.activations)
            nbytes = own.weight_bytes(subject.widths, subject.activations)
            rows.append(_predicted_action(own, form, planned, nbytes, plain))
    where = f"{subject.name} on {device.target.name}, activations {subject.activations}"
    source = by_form["dequantized"][0].rates.source
    published = published_actions(device.target)
    today = device.target.product_form(subject.activations, subject.two_level)
    return PredictionReport(where, source, tuple(rows), today, forms, published)


def _predicted_action(
    model: LatencyModel,
    form: ProductForm | Literal["float"],
    predicted: LatencyPrediction,
    weight_bytes: float,
    plain: LatencyPrediction,
) -> PredictedAction:
    return PredictedAction(
        model.mode.name,
        "float" if form == "float" else "plan",
        form,
        weight_bytes,
        predicted.total_ms / plain.total_ms,
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
    activations: ActivationSupport = "int8" if setting.activation_bits else "none"
    two_level = scale_form(measured.quantizer) == "two-level"
    form = device.target.product_form(activations, two_level)
    network = shape_of(shapes, recognize(policy).inputs(policy, preset))
    return LatencyLimit(max_ms, device.models(network, form)[0], activations)
