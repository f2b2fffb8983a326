"""`qvla predict` and `qvla rates`: predicted latency, and the rates of this machine's CPU."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import typer
from numpy.typing import NDArray

from qvla_export.artifacts import write_json
from qvla_export.cli.options import ThreadsOption
from qvla_export.errors import QvlaError

if TYPE_CHECKING:
    from qvla_export.allocation import LatencyLimit
    from qvla_export.kernel_rates import KernelRates
    from qvla_export.latency_model import LatencyModel, LatencyPrediction
    from qvla_export.network_shape import NetworkShape, PolicyInputs
    from qvla_export.plan import BitPlan
    from qvla_export.run_folder import Setting
    from qvla_export.sensitivity import Sensitivities
    from qvla_export.target import ActivationSupport, PowerMode, Target

RatesOption = Annotated[
    Path | None, typer.Option("--rates", help="Device rates that `qvla rates` measured, for cpu.")
]
PowerModeOption = Annotated[
    str | None,
    typer.Option("--power-mode", help="Power mode the prediction is for; the target's fastest."),
]
MaxPredictedOption = Annotated[
    float | None, typer.Option(help="Longest predicted action, ms; needs --policy.")
]
LimitedPolicyOption = Annotated[
    Path | None,
    typer.Option("--policy", help="Checkpoint that says the images and chunk a prediction needs."),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(predict)
    app.command()(rates)


def predict(
    bundle: Annotated[
        Path | None, typer.Argument(help="Quantized bundle; its plan and inputs are used.")
    ] = None,
    geometry: Annotated[
        str | None,
        typer.Option(help="Published sizes instead of a bundle: openvla-7b, openvla-oft-7b."),
    ] = None,
    bits: Annotated[
        str,
        typer.Option(help="Widths of a geometry: 4, or shares of the channels, 8:0.3,4:0.6,0:0.1."),
    ] = "4",
    activations: Annotated[
        Literal["none", "int8"], typer.Option(help="Activations of a geometry's products.")
    ] = "none",
    target: Annotated[
        str | None, typer.Option("--target", help="Target; of a bundle, the one it is for.")
    ] = None,
    power_mode: Annotated[
        str | None, typer.Option("--power-mode", help="One power mode; without it, all of them.")
    ] = None,
    rates: RatesOption = None,
    output: Annotated[
        Path | None, typer.Option("--json", help="Write the predictions to this JSON file.")
    ] = None,
) -> None:
    """Predict an action's milliseconds from a roofline of the target; nothing is measured."""
    from engines.targets import find_target

    if (bundle is None) == (geometry is None):
        raise QvlaError("predict a bundle or a --geometry, one of the two")
    if bundle is not None:
        network, widths, setting, of = _of_bundle(bundle)
        name = str(bundle)
    else:
        assert geometry is not None
        network, widths = _of_geometry(geometry, bits)
        setting, of, name = activations, "orin-jp7", f"{geometry}, {bits} bits"
    device = find_target(target or of)
    found = []
    for mode, kernels in _modes(device, power_mode, rates):
        model = _model(network, device, mode, kernels)
        found.append(_row(model, "float", model.predict()))
        found.append(_row(model, "plan", model.predict(widths, setting)))
    typer.echo(f"predicted, not measured: {name} on {device.name}, activations {setting}")
    for row in found:
        typer.echo(_line(row))
    typer.echo(f"rates: {kernels.source}")
    if output is not None:
        write_json(output, {"predicted": name, "target": device.name, "rows": found})


def rates(
    output: Annotated[Path, typer.Argument(help="JSON file for --rates.")],
    threads: ThreadsOption = None,
) -> None:
    """Measure this CPU's bandwidth, products and launches under ONNX Runtime; half a minute."""
    from engines.cpu_rates import measure_cpu_rates
    from engines.targets import find_target
    from qvla_export.probe_graphs import probe_graphs

    measured = measure_cpu_rates(probe_graphs(find_target("cpu")), threads)
    measured.save(output)
    tops = measured.mode.dense_tops
    typer.echo(
        f"rates of {measured.mode.name}: {measured.mode.bandwidth_gb_s:.1f} GB/s, float32 "
        f"{tops['float32'] * 1e3:.0f} GFLOP/s, int8 {tops['int8'] * 1e3:.0f} GOP/s -> {output}"
    )


def latency_limit(
    measured: "Sensitivities",
    setting: "Setting",
    target: "Target",
    max_ms: float,
    power_mode: str | None,
    rates: Path | None,
    policy: Path | None,
    preset: str | None,
) -> "LatencyLimit":
    """Return the limit that a planned setting must keep.

    Raises:
        QvlaError: the setting is not planned, or nothing says what the policy is given.
    """
    from qvla_export.allocation import LatencyLimit
    from qvla_export.network_shape import network_of

    if setting.kind != "planned":
        raise QvlaError(f"setting {setting.name} has fixed widths; limit a planned one, such as w4")
    if policy is None:
        raise QvlaError(
            "--max-predicted-ms needs --policy, the checkpoint that says how many images a policy "
            "sees and how many actions it returns"
        )
    shapes = {n: (v.shape[1], measured.weights_per_channel[n]) for n, v in measured.values.items()}
    network = network_of(shapes, checkpoint_inputs(policy, preset))
    mode, kernels = _modes(target, power_mode, rates)[0]
    model = _model(network, target, mode, kernels)
    return LatencyLimit(max_ms, model, "int8" if setting.activation_bits else "none")


def plan_figures(
    planned: "BitPlan",
    measured: "Sensitivities",
    setting: "Setting",
    target: "Target",
    limit: "LatencyLimit | None",
) -> str:
    """Say how far an allocated plan is from the bound, and how long an action is predicted."""
    from qvla_export.allocation import Budget, least_error

    if planned.expected_error is None:
        return "error: unknown, the plan is uniform"
    least = least_error(measured, Budget("bits per channel", setting.bits), target)
    text = f"additive error: {planned.expected_error:.4g}, at least {least:.4g} under this budget"
    if limit is None:
        return text
    predicted = limit.model.predict(planned.widths, limit.activations)
    return f"{text}; an action: predicted {predicted.total_ms:.2f} ms ({limit})"


def checkpoint_inputs(checkpoint: Path, preset: str | None) -> "PolicyInputs":
    """Return what decides the rows of a checkpoint's layers; reads no weights.

    Raises:
        QvlaError: its configuration is missing or malformed.
    """
    from qvla_export.geometries import PROMPT_TOKENS
    from qvla_export.images import load_image_spec
    from qvla_export.network_shape import PolicyInputs
    from qvla_export.policies.oft_config import PRESETS, load_config

    if preset is not None and preset not in PRESETS:
        raise QvlaError(f"preset must be one of {sorted(PRESETS)}, got {preset!r}")
    config = load_config(checkpoint) if preset is None else PRESETS[preset]
    image = load_image_spec(checkpoint / "preprocessor_config.json")
    return PolicyInputs(
        images=len(config.cameras),
        image_size=image.size,
        prompt_tokens=PROMPT_TOKENS,
        horizon=config.horizon,
        action_dim=config.action_dim,
        state_dim=config.state_dim,
        head=config.head,
    )


def _of_bundle(
    path: Path,
) -> tuple["NetworkShape", dict[str, NDArray[np.int8]], "ActivationSupport", str]:
    """Network, widths, activations and target of a quantized bundle."""
    from qvla_export.bundle import PLAN, Bundle
    from qvla_export.network_shape import PolicyInputs, network_of
    from qvla_export.plan import BitPlan

    bundle = Bundle.load(path)
    if bundle.plan is None:
        raise QvlaError(
            f"{path} is a float bundle, which does not list its layers; give a quantized bundle "
            "of the same policy: its prediction shows float beside it"
        )
    plan, spec = BitPlan.load(path / PLAN), bundle.processor.spec
    shapes = {name: (len(w), plan.weights_per_channel[name]) for name, w in plan.widths.items()}
    inputs = PolicyInputs(
        images=len(spec.cameras),
        image_size=spec.image.size,
        prompt_tokens=bundle.golden().feeds[0]["input_ids"].shape[1],
        horizon=spec.horizon,
        action_dim=spec.action_dim,
        state_dim=spec.state_dim,
    )
    setting: ActivationSupport = "none" if plan.activations is None else "int8"
    return network_of(shapes, inputs), dict(plan.widths), setting, plan.target


def _of_geometry(name: str, bits: str) -> tuple["NetworkShape", dict[str, NDArray[np.int8]]]:
    from qvla_export.geometries import find_geometry

    geometry = find_geometry(name)
    shares = _shares(bits)
    widths = {}
    for layer, (channels, _) in geometry.layers.items():
        # Equal places in every layer, so that gate and up prune the same units.
        stops = np.rint(np.cumsum(list(shares.values())) * channels).astype(int)
        counts = np.diff(stops, prepend=0)
        widths[layer] = np.repeat(np.array(list(shares), np.int8), counts)
    return geometry.network, widths


def _shares(text: str) -> dict[int, float]:
    """Read "4" or "8:0.3,4:0.7": width -> share of the channels."""
    from qvla_export.target import WIDTHS

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


def _modes(
    target: "Target", name: str | None, measured: Path | None
) -> list[tuple["PowerMode", "KernelRates"]]:
    """Power modes to predict for, with their kernel rates."""
    from engines.kernel_rates import kernel_rates
    from qvla_export.kernel_rates import DeviceRates

    if measured is not None:
        device = DeviceRates.load(measured)
        return [(device.mode, device.rates)]
    kernels = kernel_rates(target)
    modes = target.power_modes if name is None else (target.power_mode(name),)
    return [(mode, kernels) for mode in modes]


def _model(
    network: "NetworkShape", target: "Target", mode: "PowerMode", kernels: "KernelRates"
) -> "LatencyModel":
    from qvla_export.latency_model import LatencyModel

    return LatencyModel(network, target, mode, kernels)


def _row(model: "LatencyModel", what: str, predicted: "LatencyPrediction") -> dict[str, Any]:
    return {
        "power_mode": model.mode.name,
        "weights": what,
        "predicted_ms": predicted.total_ms,
        "low_ms": predicted.total_ms / predicted.uncertainty,
        "high_ms": predicted.total_ms * predicted.uncertainty,
        "stages_ms": {stage.name: stage.total_ms for stage in predicted.stages},
    }


def _line(row: dict[str, Any]) -> str:
    stages = ", ".join(f"{name} {ms:.1f}" for name, ms in row["stages_ms"].items())
    return (
        f"{row['power_mode']:>6} {row['weights']:>5}: predicted {row['predicted_ms']:.1f} ms "
        f"[{row['low_ms']:.0f}, {row['high_ms']:.0f}] = {stages}"
    )
