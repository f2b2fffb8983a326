"""What a policy in memory is tried on before a deployment, and how often each of it counts."""

from collections.abc import Callable
from dataclasses import astuple, replace
from pathlib import Path

import pytest
import torch
from command_runs import Inputs, Outcome, qvla

from engines.targets import CPU
from qvla_export.allocation.setting import parse_setting
from qvla_export.pipeline.policy_source import PolicySource, open_checkpoint
from qvla_export.pipeline.run_folder import RECORD_SUFFIX
from qvla_export.pipeline.sizing import step_costs, trial_costs
from qvla_export.pipeline.sizing.machine_rates import MachineRates
from qvla_export.pipeline.sizing.policy_costs import policy_costs
from qvla_export.pipeline.sizing.step_costs import Workload
from qvla_export.pipeline.sizing.streamed_memory import StreamedMemory
from qvla_export.pipeline.sizing.tracing import TraceRates, measure_tracing
from qvla_export.pipeline.sizing.trial import Trial, TrialWork, try_policy
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.quantizer.rounding_costs import Rates
from qvla_export.shared.observation import Observation

Make = Callable[..., list[Observation]]
# Reading and Python's own steps cost nothing, so that what was tried is all there is.
FREE = MachineRates(Rates(1e99, 1e99, 1e99, 1e99, 1e99), 1e99, 1e99, 1e99)
HOW = TrialWork(CPU, True, 4, 2, None, True)
W4 = parse_setting("w4")
SOME = Trial(
    batch_size=8,
    acts_s=2.0**-10,
    moments_s=1.0,
    sensitivities_s=2.0,
    kept_s=4.0,
    activations_s=0.5,
    activation_groups=3,
    errors_s=8.0,
    rounding_s=16.0,
    recording_s=0.25,
    pair_s=0.125,
)


@pytest.fixture(scope="module")
def work(tiny_checkpoint: Path) -> Workload:
    costs = policy_costs(PolicySource(str(tiny_checkpoint)), open_checkpoint(tiny_checkpoint))
    return Workload(costs, FREE, 20, 8, 8, 4, True, None, trial=SOME)


@pytest.mark.parametrize("compensated", [True, False])
@pytest.mark.parametrize("max_bytes", [None, 12_000_000])
def test_a_policy_is_tried_and_left_as_it_was(
    tiny_policy: OftPolicy, tiny_observations: Make, compensated: bool, max_bytes: int | None
) -> None:
    before = {name: value.clone() for name, value in tiny_policy.module.state_dict().items()}
    how = replace(HOW, compensated=compensated, max_bytes=max_bytes)
    trial = try_policy(tiny_policy, tiny_observations(1)[0], how)
    without = (trial.moments_s, trial.rounding_s)
    assert min(without) > 0 if compensated else without == (0, 0)
    others = replace(trial, moments_s=1.0, rounding_s=1.0)
    assert min(astuple(others)) > 0
    after = tiny_policy.module.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.get_default_dtype() == torch.float32
    assert not any("forward" in vars(module) for module in tiny_policy.module.modules())


def test_what_was_tried_counts_as_often_as_it_is_done(work: Workload) -> None:
    """20 observations are three batches of eight; two of them are of the 16 that are kept for."""
    assert step_costs.moment_costs(work).cpu_s == pytest.approx(3)
    assert step_costs.sensitivity_costs(work).cpu_s == pytest.approx(8 + 3 * 2)
    assert trial_costs.kept_costs(work, 100).cpu_s == 2 * 4
    assert step_costs.rounding_costs(work, W4).cpu_s == 16
    recorded = trial_costs.activation_costs(work)
    assert (recorded.cpu_s, recorded.disk_bytes) == (20 * 0.5, 3 * 8 * 8192)
    # Two engines of w4 and one of float, and a server; 10 rounds before those that count.
    settings = (parse_setting("float"), W4)
    timed_s = trial_costs.latency_costs(work, settings, 22).cpu_s
    assert timed_s == pytest.approx(3 * step_costs.OPENING_S + 4 * 32 * 2.0**-10)
    # Float actions, the plan's, the engine's.
    acting_s = step_costs.error_costs(work, W4).cpu_s
    more_s = step_costs.error_costs(replace(work, held_out=16), W4).cpu_s
    assert acting_s is not None and more_s is not None
    assert 2 * 8 * 2.0**-10 < more_s - acting_s < 6 * 8 * 2.0**-10


def test_exact_pairs_are_those_of_a_minute(work: Workload) -> None:
    layers = len(work.policy.layers)
    told_s = trial_costs.agreement_costs(work, 10).cpu_s
    codes_s = min(1, 10 / layers) * 8
    assert told_s == pytest.approx(3 * (0.25 + 10 * 0.125) + codes_s + 8 + 2)
    # Six are timed; then as many as take a minute by that.
    six_s = 3 * (0.25 + 6 * 0.125) + min(1, 6 / layers) * 8
    pairs = int(60 / (six_s / 6))
    assert 6 < pairs < 500
    minute_s = six_s + 3 * (0.25 + pairs * 0.125) + min(1, pairs / layers) * 8 + 8 + 2
    assert trial_costs.agreement_costs(work, None).cpu_s == pytest.approx(minute_s)
    # A minute of the thread that measures: more where others help it.
    helped = trial_costs.agreement_costs(
        replace(work, trial=replace(SOME, pair_threads=2.0)), None
    ).disk_bytes
    assert helped == int(60 / (six_s / 6 / 2)) * 90
    quick = replace(work, trial=replace(SOME, recording_s=0.0, pair_s=1e-6, errors_s=0.0))
    assert trial_costs.agreement_costs(quick, None).disk_bytes == 500 * 90


def test_a_large_policy_or_one_on_disk_is_not_tried(
    work: Workload, tiny_policy: OftPolicy, tiny_observations: Make
) -> None:
    observation = tiny_observations(1)[0]
    untried = replace(work, trial=None)
    slow = replace(untried, rates=MachineRates(Rates(1, 1, 1, 1, 1), 1, 1, 1))
    assert trial_costs.tried(slow, tiny_policy, observation, HOW).trial is None
    assert trial_costs.tried(untried, tiny_policy, observation, HOW).trial is not None
    # Arithmetic alone says something of every step as well.
    for step in (
        trial_costs.agreement_costs(slow, None),
        trial_costs.kept_costs(slow, 100),
        trial_costs.activation_costs(slow),
    ):
        assert step.cpu_s is not None and step.cpu_s > 0


@pytest.mark.usefixtures("known_rates")
def test_settings_that_round_inputs_record_them_first(inputs: Inputs, tmp_path: Path) -> None:
    told = qvla(
        *("deploy", "--policy", inputs.checkpoint, "--dataset", inputs.dataset, "--plan-only"),
        *("--run", tmp_path / "run", "--settings", "float,w8a8", "--check-pairs", 0),
    )
    assert told.code == 0, told.err
    names = [line.split("  ")[0] for line in told.out.splitlines()]
    assert names.index("activations") < names.index("float: bundle") < names.index("w8a8: plan")


@pytest.mark.usefixtures("known_rates")
def test_every_recorded_step_is_foretold(
    inputs: Inputs, deployed: tuple[Path, Outcome], tmp_path: Path
) -> None:
    run, outcome = deployed
    assert outcome.code == 0
    told = inputs.deploy(tmp_path / "run", "--plan-only")
    assert told.code == 0, told.err
    names = [line.split("  ")[0] for line in told.out.splitlines()[1:-2]]
    records = list(run.rglob(f"*{RECORD_SUFFIX}"))
    # The report has no record: nothing is made of it.
    assert len(records) == len(names) - 1, (names, records)
    assert {"kept layers", "agreement with exact"} < set(names)


def test_tracing_is_measured_on_a_part_of_each_kind(work: Workload, tiny_policy: OftPolicy) -> None:
    rates = measure_tracing(tiny_policy, work.policy, CPU)
    assert rates is not None
    assert rates.graph_s > 0 and rates.inside_s > 0 and rates.once_s >= 0
    # Of one part nothing shows what is of the graph and what is of the layers in it.
    alike = replace(work.policy, parts=work.policy.parts[:1])
    assert measure_tracing(tiny_policy, alike, CPU) is None


def test_a_graph_in_memory_is_traced_once_and_parts_each_time(work: Workload) -> None:
    rates = TraceRates(once_s=100.0, graph_s=10.0, inside_s=1000.0)
    whole = replace(work, tracing=rates)
    cut = replace(whole, trial=None, streamed=StreamedMemory(sensitivities=1, rounding=1))
    parts = len(work.policy.parts)
    for held, first, traced_s in (
        (whole, True, 100 + 10 + 1000),
        (whole, False, 0),
        (cut, True, 100 + 10 * parts + 1000),
        (cut, False, 10 * parts + 1000),
    ):
        taken = step_costs.export_costs(held, W4, first).cpu_s
        assert taken == pytest.approx(traced_s, abs=0.1)
