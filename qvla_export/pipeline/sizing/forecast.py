"""What a deployment will take of this machine, said before anything starts or is written."""

import json
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from qvla_export.measurement.peak_memory import high_water_bytes, resident_bytes
from qvla_export.pipeline.calibrate import fitting_draw, load_calibration
from qvla_export.pipeline.deploy import Deployment, check_inputs, compares_exactly, whole_work
from qvla_export.pipeline.sizing import step_costs as costs
from qvla_export.pipeline.sizing.holding import blank_observation
from qvla_export.pipeline.sizing.machine_rates import MachineRates, cpu_seconds, measure_machine
from qvla_export.pipeline.sizing.policy_costs import PolicyCosts, policy_costs
from qvla_export.pipeline.sizing.step_costs import StepCosts, Workload
from qvla_export.pipeline.sizing.streamed_memory import streamed_memory
from qvla_export.pipeline.sizing.tracing import measure_tracing
from qvla_export.pipeline.sizing.trial import TrialWork
from qvla_export.pipeline.sizing.trial_costs import (
    activation_costs,
    agreement_costs,
    kept_costs,
    latency_costs,
    tried,
    with_tuning,
)

if TYPE_CHECKING:
    from qvla_export.policies.base import Policy
    from qvla_export.shared.observation import Observation

_FORMAT = "qvla.forecast/1"
# Of the report with its figures.
_REPORT_BYTES = 320_000
_NOTES = (
    "Work of the run folder that is up to date already is not subtracted. Not foretold (-): "
    "drawing from the simulator and simulated episodes; starting up takes some seconds more."
)


@dataclass(frozen=True)
class Forecast:
    """What every step is going to take."""

    # How the policy is held, in one line, and by what rates this was computed.
    holding: str
    rates: MachineRates
    steps: tuple[StepCosts, ...]

    @property
    def cpu_s(self) -> float:
        """Return the CPU seconds of all steps that are foretold."""
        return sum(step.cpu_s or 0.0 for step in self.steps)

    @property
    def disk_bytes(self) -> int:
        """Return the bytes of the run folder."""
        return sum(step.disk_bytes for step in self.steps)

    @property
    def memory_bytes(self) -> int:
        """Return the peak of resident memory."""
        return max(step.memory_bytes for step in self.steps)

    def to_json(self) -> dict[str, Any]:
        """Return what `qvla deploy --plan-only --json` prints."""
        total = {n: getattr(self, n) for n in ("cpu_s", "memory_bytes", "disk_bytes")}
        return {
            "format": _FORMAT,
            "holding": self.holding,
            "rates": asdict(self.rates),
            "steps": [asdict(step) for step in self.steps],
            "total": total,
        }

    def text(self, as_json: bool = False) -> str:
        """Return a table for a person, or the JSON document."""
        if as_json:
            return json.dumps(self.to_json(), indent=1)
        total = StepCosts("all", self.cpu_s, self.memory_bytes, self.disk_bytes)
        rows = [("step", "CPU s", "peak memory", "disk"), *map(_row, (*self.steps, total))]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join(
                text.rjust(width) if column else text.ljust(width)
                for column, (text, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return "\n".join([*lines, _NOTES])


def forecast(request: Deployment, policy: "Policy", rates: MachineRates | None = None) -> Forecast:
    """Say what a deployment takes; nothing is written.

    Args:
        request: as `deploy` takes it.
        policy: held as the request says.
        rates: of this machine; None measures them, which takes about two seconds. A part of
            each kind is traced as well, and a policy in memory that is not large is tried on a
            batch.

    Raises:
        QvlaError: data and policy do not fit, or what `deploy` refuses before its first step.
    """
    check_inputs(request, policy)
    request.holding.require_whole_for(whole_work(request))
    before = resident_bytes() or high_water_bytes()
    size = policy_costs(request.source, policy)
    usual, batch = size.usual_layer, request.holding.batch_size
    rates = rates or measure_machine(batch * usual.tokens, usual.inputs, usual.channels)
    work = _work(request, policy, size, rates)
    steps = [
        replace(work.recorded(step), memory_bytes=step.memory_bytes + before)
        for step in _steps(request, policy, work)
    ]
    return Forecast(request.holding.describe(), rates, tuple(steps))


def _work(
    request: Deployment, policy: "Policy", size: PolicyCosts, rates: MachineRates
) -> Workload:
    from engines.targets import find_target

    count, held_out = _observations(request)
    observation, held = _observation(request, policy), request.holding
    compensated = request.quantizer == "compensated"
    streamed = None if held.resident else streamed_memory(request, policy, observation, count)
    probes = request.probes or size.action_numbers
    work = Workload(size, rates, count, held_out, held.batch_size, probes, compensated, streamed)
    target = find_target(request.target, request.zero_points, request.scales)
    together = min(held.batch_size, count)
    rounded = _rounds_inputs(request)
    how = TrialWork(target, compensated, request.probes, together, held.max_bytes, rounded)
    if held.resident:
        policy.module.to(held.device)
    work = tried(work, policy, observation, how)
    if held.resident:
        policy.module.to("cpu")
    return replace(work, tracing=measure_tracing(policy, size, target))


def _rounds_inputs(request: Deployment) -> bool:
    return any(setting.activation_bits for setting in request.settings)


def _observation(request: Deployment, policy: "Policy") -> "Observation":
    """Return one that is measured on, or is like them."""
    drawn = request.calibration
    if drawn is None:
        stored = load_calibration(request.run).observations
        return max(stored, key=lambda item: len(policy.processor.prompt_ids(item)))
    if drawn.dataset is None:
        return blank_observation(policy)
    return drawn.dataset.frame(0, 0).observation


def _observations(request: Deployment) -> tuple[int, int]:
    drawn = request.calibration
    if drawn is None:
        stored = load_calibration(request.run)
        return len(stored.observations), len(stored.held_out)
    if drawn.dataset is None:
        return drawn.count, drawn.held_out
    fitting = fitting_draw(drawn, drawn.dataset)
    return fitting.count, fitting.held_out


def _steps(request: Deployment, policy: "Policy", work: Workload) -> list[StepCosts]:
    from engines.load import runtime_here
    from engines.targets import find_target

    found, planned = find_target(request.target), [s for s in request.settings if s.kind != "float"]
    steps = [_calibration(request, policy, work)]
    if work.compensated and work.resident:
        steps.append(costs.moment_costs(work))
    steps.append(costs.sensitivity_costs(work))
    if work.resident and (kept := policy.kept_layers()):
        steps.append(kept_costs(work, sum(len(layer.weight) for layer in kept.values())))
    if compares_exactly(request):
        steps.append(agreement_costs(work, request.check_pairs))
    if _rounds_inputs(request):
        steps.append(activation_costs(work))
    for number, setting in enumerate(request.settings):
        # The first bundle loads libraries, which stay.
        loaded = costs.LIBRARY_BYTES if number else 0
        if setting in planned:
            steps.append(costs.plan_costs(work, setting).beside(loaded))
        if setting.kind == "planned" and work.compensated:
            rounded = costs.rounding_costs(work, setting)
            rounded = (
                with_tuning(work, rounded) if request.tune_codes and work.resident else rounded
            )
            steps.append(rounded.beside(loaded))
        steps.append(costs.export_costs(work, setting, first=number == 0))
        steps.append(costs.error_costs(work, setting))
    if runtime_here(found) == found.runtime and work.resident:
        timed = latency_costs(work, request.settings, request.samples)
        steps.append(timed.beside(costs.LIBRARY_BYTES))
    if request.episodes:
        steps.append(StepCosts("episodes", None, 0, 0))
    steps.append(StepCosts("report", 1.0, costs.LIBRARY_BYTES, _REPORT_BYTES))
    return steps


def _calibration(request: Deployment, policy: "Policy", work: Workload) -> StepCosts:
    """Return what drawing takes: the time of one frame, as many times; pictures lie as pixels."""
    drawn, number = request.calibration, work.count + work.held_out
    if drawn is None:
        return StepCosts("calibration", 0.0, 0, 0)
    spec = policy.processor.spec
    dataset = drawn.dataset
    if dataset is None:
        pixels, taken = len(spec.cameras) * 3 * spec.pixels, None
    else:
        images = dataset.frame(0, 0).observation.images
        pixels = sum(images[name].nbytes for name in spec.cameras)
        # Read once to draw, and once more where a finished set is compared.
        taken = number * cpu_seconds(lambda: dataset.frame(0, 0))
    # Beside pictures: state, instruction, demonstrated actions.
    beside = 4 * (spec.state_dim + 2 * work.policy.action_numbers) + 16
    disk = number * (pixels + beside)
    return StepCosts("calibration", taken, 2 * disk, disk)


def _row(step: StepCosts) -> tuple[str, str, str, str]:
    taken = "-" if step.cpu_s is None else f"{step.cpu_s:,.1f}"
    memory, disk = f"{step.memory_bytes / 1e9:.2f} GB", f"{step.disk_bytes / 1e6:,.2f} MB"
    return step.name, taken, memory, disk
