"""What `qvla deploy --plan-only` says before anything is done, against what is then done."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_runs import Inputs, Outcome, qvla
from forecast_rates import RATES

from qvla_export.allocation.setting import parse_setting
from qvla_export.pipeline.policy_source import PolicySource, open_checkpoint
from qvla_export.pipeline.sizing import step_costs
from qvla_export.pipeline.sizing.policy_costs import PolicyCosts, policy_costs
from qvla_export.pipeline.sizing.step_costs import StepCosts, Workload
from qvla_export.pipeline.sizing.streamed_memory import StreamedMemory
from qvla_export.pipeline.sizing.trial_costs import with_tuning
from qvla_export.policies.layers import layer_shapes, traced_layers

W4 = parse_setting("w4")


@pytest.fixture(scope="module")
def tiny_costs(tiny_checkpoint: Path) -> PolicyCosts:
    source = PolicySource(str(tiny_checkpoint))
    return policy_costs(source, open_checkpoint(tiny_checkpoint))


def work_of(costs: PolicyCosts, count: int = 16, **changes: Any) -> Workload:
    work = Workload(costs, RATES, count, 8, 8, 4, True, None)
    return replace(work, **changes)


def all_steps(work: Workload) -> list[StepCosts]:
    return [
        step_costs.moment_costs(work),
        step_costs.sensitivity_costs(work),
        step_costs.plan_costs(work, W4),
        step_costs.rounding_costs(work, W4),
        step_costs.export_costs(work, W4, first=True),
        step_costs.error_costs(work, W4),
    ]


def totals(document: str) -> Mapping[str, float]:
    value = json.loads(document)
    assert value["format"] == "qvla.forecast/1"
    total: Mapping[str, float] = value["total"]
    assert total["disk_bytes"] == sum(step["disk_bytes"] for step in value["steps"])
    assert total["memory_bytes"] == max(step["memory_bytes"] for step in value["steps"])
    return total


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.usefixtures("known_rates")
def test_bytes_on_disk_are_those_of_the_run(
    inputs: Inputs, deployed: tuple[Path, Outcome], tmp_path: Path
) -> None:
    run, outcome = deployed
    assert outcome.code == 0
    told = inputs.deploy(tmp_path / "run", "--plan-only", "--json")
    assert told.code == 0, told.err
    # The report and what tells of steps have figures of their own, whatever the policy's size.
    assert totals(told.out)["disk_bytes"] == pytest.approx(bytes_of(run), rel=0.25)
    assert not (tmp_path / "run").exists()
    # What the first bundle loads is still in memory when the next plan is drawn up.
    held = {step["name"]: step["memory_bytes"] for step in json.loads(told.out)["steps"]}
    before, after = held["calibration"], held["w4-rtn: plan"]
    assert after > before + step_costs.LIBRARY_BYTES


def test_nothing_is_written(inputs: Inputs, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    told = inputs.deploy(tmp_path / "run", "--plan-only")
    assert told.code == 0, told.err
    assert list(tmp_path.iterdir()) == []
    lines = told.out.splitlines()
    assert lines[0].split() == ["step", "CPU", "s", "peak", "memory", "disk"]
    names = [line.split("  ")[0] for line in lines[1:-1]]
    assert names[:3] == ["calibration", "moments", "sensitivities"]
    assert {"w4: rounding", "w4: bundle", "w4-rtn: bundle"} < set(names)
    assert "w4-rtn: rounding" not in names
    assert names[-1] == "all"


@pytest.mark.usefixtures("known_rates")
def test_part_by_part_is_foretold_within_the_bound(inputs: Inputs, tmp_path: Path) -> None:
    told = inputs.deploy(
        *(tmp_path / "run", "--plan-only", "--json", "--check-pairs", 0),
        *("--max-memory-gb", 0.15),
    )
    assert told.code == 0, told.err
    value = json.loads(told.out)
    names = [step["name"] for step in value["steps"]]
    assert "part by part" in value["holding"]
    # Moments are measured on the way and never lie on disk; latency is not measured.
    assert "moments" not in names
    assert "latency" not in names


def test_what_expands_to_8_bits_has_scales_of_two_levels(inputs: Inputs, tmp_path: Path) -> None:
    told = inputs.deploy(tmp_path / "run", "--plan-only", "--settings", "float,w4a8")
    assert told.code == 0, told.err
    assert "scales of two levels" in told.err


def test_what_deploy_refuses_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    told = qvla(
        *("deploy", "--policy", inputs.checkpoint, "--dataset", inputs.dataset, "--plan-only"),
        *("--run", tmp_path / "run", "--camera", "image=nowhere"),
    )
    assert "nowhere" in told.error


def test_costs_grow_with_observations_and_layers(tiny_costs: PolicyCosts) -> None:
    few, many = work_of(tiny_costs, 16), work_of(tiny_costs, 160)
    numbers = 3 * tiny_costs.graph_numbers
    deep = work_of(replace(tiny_costs, parts=tiny_costs.parts * 3, graph_numbers=numbers))
    for name, less, more, deeper in zip(
        ("moments", "sensitivities", "plan", "rounding", "bundle", "action error"),
        *map(all_steps, (few, many, deep)),
        strict=True,
    ):
        assert less.cpu_s is not None
        assert more.cpu_s is not None
        assert deeper.cpu_s is not None
        assert deeper.cpu_s > less.cpu_s, name
        if name in ("moments", "sensitivities"):
            assert more.cpu_s > 2 * less.cpu_s
        else:
            assert more.cpu_s == less.cpu_s
        assert more.disk_bytes == less.disk_bytes
        assert deeper.disk_bytes >= less.disk_bytes


def test_tuning_codes_grows_with_observations_up_to_its_steps(tiny_costs: PolicyCosts) -> None:
    made, taken = StepCosts("w4: rounding", 1.0, 100, 10), {}
    for count in (16, 160, 1600, 3200):
        tuned = with_tuning(work_of(tiny_costs, count), made)
        assert tuned.cpu_s is not None and tuned.memory_bytes > made.memory_bytes
        assert tuned.disk_bytes == made.disk_bytes
        taken[count] = tuned.cpu_s - 1.0
    # 14 observations are one batch, 140 nine.
    assert taken[160] == pytest.approx(9 * taken[16])
    assert taken[160] < taken[1600] == taken[3200]


def test_part_by_part_takes_the_memory_of_one_part(tiny_costs: PolicyCosts) -> None:
    whole = work_of(replace(tiny_costs, parts=tiny_costs.parts * 8))
    parts = replace(whole, streamed=StreamedMemory(sensitivities=1000, rounding=2000))
    one, other = all_steps(whole)[1:], all_steps(parts)[1:]
    assert [step.memory_bytes for step in (other[0], other[2])] == [1000, 2000]
    for own, taken in zip(other, one, strict=True):
        assert own.memory_bytes <= taken.memory_bytes, own.name


def test_a_bundle_has_no_more_observations_than_are_held_out(tiny_costs: PolicyCosts) -> None:
    """Eight of them at most."""
    two, eight, twenty = (
        step_costs.export_costs(work_of(tiny_costs, held_out=number), W4, first=True)
        for number in (2, 8, 20)
    )
    assert eight.disk_bytes - two.disk_bytes >= 6 * tiny_costs.feed_bytes
    assert twenty == eight


def test_part_by_part_moments_are_added_for_each_observation(tiny_costs: PolicyCosts) -> None:
    """And those of sensitivities are measured by their own probes."""
    streamed = StreamedMemory(sensitivities=1000, rounding=2000)
    small = work_of(tiny_costs, 16, streamed=streamed, batch_size=4)
    assert step_costs.rounding_costs(replace(small, batch_size=16), W4).cpu_s == pytest.approx(
        step_costs.rounding_costs(small, W4).cpu_s
    )
    whole = replace(small, streamed=None)
    added = [step_costs.moment_costs(replace(whole, batch_size=n)).cpu_s for n in (4, 16)]
    assert added[0] is not None and added[1] is not None and added[0] > added[1]
    one, four = (step_costs.sensitivity_costs(replace(small, probes=n)).cpu_s for n in (1, 4))
    rounding = [step_costs.rounding_costs(replace(small, probes=n), W4).cpu_s for n in (1, 4)]
    assert one is not None and four is not None and one < four
    assert rounding[0] == rounding[1]


def test_what_observations_count_takes_a_sweep_of_its_own(tiny_costs: PolicyCosts) -> None:
    """Each of the sweeps reads all weights twice: for that, for moments, for errors."""
    slow = replace(RATES, bytes_per_s=1.0)
    streamed = StreamedMemory(sensitivities=1000, rounding=2000)
    for compensated, sweeps in ((True, 3), (False, 1)):
        work = work_of(tiny_costs, streamed=streamed, rates=slow, compensated=compensated)
        taken = step_costs.sensitivity_costs(work).cpu_s
        assert taken is not None
        assert round(taken / tiny_costs.weight_bytes) == 2 * sweeps


def test_each_graph_of_a_policy_part_by_part_is_traced(tiny_costs: PolicyCosts) -> None:
    """Parts without layers take their time as well."""
    streamed = StreamedMemory(sensitivities=1000, rounding=2000)
    work = work_of(tiny_costs, streamed=streamed)
    empty = [replace(part, layers=()) for part in tiny_costs.parts]
    more = replace(work, policy=replace(tiny_costs, parts=(*tiny_costs.parts, *empty)))
    one, other = (step_costs.export_costs(w, W4, first=False).cpu_s for w in (work, more))
    assert one is not None and other is not None and other > one


def test_a_policy_is_sized_as_it_is(tiny_costs: PolicyCosts, tiny_checkpoint: Path) -> None:
    policy = open_checkpoint(tiny_checkpoint)
    shapes = layer_shapes(traced_layers(policy))
    assert {x.name: (x.channels, x.inputs) for x in tiny_costs.layers} == shapes
    assert tiny_costs.stored_numbers >= tiny_costs.graph_numbers
    assert tiny_costs.graph_numbers > sum(x.weights for x in tiny_costs.layers)
    assert tiny_costs.usual_layer in tiny_costs.layers


def test_parts_are_opened_for_each_observation_that_is_judged(tiny_costs: PolicyCosts) -> None:
    def error_s(held_out: int) -> float:
        streamed = StreamedMemory(sensitivities=1000, rounding=2000)
        work = work_of(tiny_costs, streamed=streamed, held_out=held_out)
        taken = step_costs.error_costs(work, W4).cpu_s
        assert taken is not None
        return taken

    opened_s = 0.09 * len(tiny_costs.parts)
    assert error_s(4) - error_s(2) > 2 * opened_s


def test_every_step_takes_what_any_step_does(tiny_costs: PolicyCosts) -> None:
    work = work_of(tiny_costs)
    nothing = StepCosts("calibration", 0.0, 0, 0)
    least_s = work.recorded(nothing).cpu_s
    assert least_s is not None
    assert 0.1 < least_s < 0.5
    assert work.recorded(replace(nothing, cpu_s=None)).cpu_s is None
