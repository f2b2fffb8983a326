"""Codes made span by span from weights on disk: moments as of the whole, used and dropped."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_bundles import mixed_plan

from calibration.calibration_set import CalibrationSet
from engines.targets import CPU
from qvla_export.allocation.setting import parse_setting
from qvla_export.measurement.measure_moments import measure_moments
from qvla_export.measurement.moment_bounds import MomentSettings, moment_needs
from qvla_export.measurement.round_spans import SpanRounding, round_spans
from qvla_export.measurement.span_sweeps import SpanSweeps, SpanUse, open_sweeps, ways_to_go
from qvla_export.measurement.stream_limits import StreamLimits
from qvla_export.pipeline.plan import plan as plan_setting
from qvla_export.pipeline.progress import Progress
from qvla_export.pipeline.round import round_setting
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.pipeline.sensitivities import SensitivityRequest, sensitivities
from qvla_export.policies.oft.policy import OftPolicy, load_oft_policy
from qvla_export.quantizer.moments import LayerMoments, Moments
from qvla_export.quantizer.quantize import compensated_spec
from qvla_export.quantizer.round_plan import round_plan
from qvla_export.sensitivity.estimators.first_order import (
    FirstOrder,
    measure_first_order,
    open_first_order,
)
from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.observation import Observation

Make = Callable[..., list[Observation]]
HOW = MomentSettings(batch_size=2, probes=2)
MOMENTS = partial(moment_needs, settings=HOW)
CPU_DEVICE = torch.device("cpu")


@pytest.fixture(scope="module")
def stored(tiny_checkpoint: Path) -> OftPolicy:
    return load_oft_policy(tiny_checkpoint, resident=False)


def sweeps_of(policy: OftPolicy, observations: list[Observation], bound: int | None) -> SpanSweeps:
    limits = StreamLimits(HOW.batch_size, HOW.probes, MOMENTS, 0, bound)
    return open_sweeps(policy, observations, limits, HOW, CPU_DEVICE, SpanUse(moment_needs, False))


def assert_close(found: LayerMoments, expected: LayerMoments) -> None:
    """Rounding of float32 products in another order, against the largest number."""
    for part in ("mean", "inputs", "channels"):
        one, other = getattr(found, part), getattr(expected, part)
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=5e-5 * np.abs(other).max())


def test_spans_have_the_moments_of_the_whole(
    stored: OftPolicy,
    tiny_policy: OftPolicy,
    tiny_observations: Make,
    in_twos: Callable[[], None],
) -> None:
    """All observations in one sweep; in batches, a sweep for each span."""
    observations = tiny_observations(3)
    at_once = sweeps_of(stored, observations, None)
    in_twos()
    in_batches = sweeps_of(stored, observations, None)
    assert at_once.at_once and len(at_once.spans) > 2
    assert not in_batches.at_once and 1 < len(in_batches.spans) <= len(at_once.spans)
    for sweeps, size in ((at_once, 3), (in_batches, 2)):
        whole = measure_moments(tiny_policy, observations, "c", replace(HOW, batch_size=size))
        todo = list(range(1, len(sweeps.spans)))  # as if the first were done
        with closing(sweeps):
            found = {n: fed for span in todo for n, fed in sweeps.moments(span, todo)}
        assert set(found) == set(whole.layers) - set(sweeps.spans[0])
        for name, fed in found.items():
            assert_close(fed, whole.layers[name])


@pytest.fixture
def in_twos(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Returns what makes two observations go together, as if three did not fit.

    Three always do at this size: what lies between parts is little beside sums.
    """

    def limit() -> None:
        monkeypatch.setattr(
            "qvla_export.measurement.span_sweeps.ways_to_go",
            lambda count, size, least, bound: [(size, least)],
        )

    return limit


def test_all_observations_go_at_once_where_they_fit() -> None:
    assert ways_to_go(8, 8, 10, 300) == [(8, None)]
    assert ways_to_go(64, 8, 10, None) == [(64, None)]
    assert ways_to_go(64, 8, 10, 300) == [(64, None), (8, 100), (8, 10)]


@pytest.mark.parametrize("together", [2, 3])
def test_sensitivities_with_moments_on_the_way_are_those_with_moments_before(
    stored: OftPolicy,
    tiny_policy: OftPolicy,
    tiny_observations: Make,
    together: int,
    in_twos: Callable[[], None],
    tmp_path: Path,
) -> None:
    """In one sweep and in batches; a killed run goes on at the span it was in."""
    observations, spec = tiny_observations(3), compensated_spec(CPU)
    moments = measure_moments(tiny_policy, observations, "c", replace(HOW, batch_size=together))
    how = FirstOrder(spec, (0, 4), HOW.probes, HOW.seed, together, moments=moments)
    expected = measure_first_order(tiny_policy, observations, "c", how)
    own = replace(how, moments=None, span_moments=HOW, batch_size=2)

    if together == 2:
        in_twos()
    sweeps = open_first_order(stored, observations, own, CPU_DEVICE)[1]
    assert sweeps is not None and sweeps.at_once == (together == 3)

    class Killed(Exception):
        pass

    def kill(done: int, total: int) -> None:
        if done == 3:
            raise Killed

    journal = tmp_path / "progress"
    with pytest.raises(Killed):
        measure_first_order(stored, observations, "c", own, journal, kill)
    calls: list[tuple[int, int]] = []
    found = measure_first_order(
        stored, observations, "c", own, journal, lambda *done: calls.append(done)
    )
    total = calls[0][1]
    assert [done for done, _ in calls] == list(range(4, total + 1))
    for name, values in expected.values.items():
        scale = float(values.max())
        # Of moments that differ in their last digits, few codes differ.
        np.testing.assert_allclose(
            found.values[name].sum(), values.sum(), rtol=0.02, atol=1e-5 * scale
        )


def test_codes_are_those_of_the_moments_and_a_killed_run_keeps_its_layers(
    stored: OftPolicy, tiny_policy: OftPolicy, tiny_observations: Make, tmp_path: Path
) -> None:
    plan = replace(mixed_plan(tiny_policy), quantizer=compensated_spec(CPU))
    work = SpanRounding(stored, plan, tiny_observations(3), "c", HOW, tmp_path / "one")
    made = round_spans(work)
    sweeps = sweeps_of(stored, tiny_observations(3), None)
    todo = range(len(sweeps.spans))
    with closing(sweeps):
        fed = {name: own for span in todo for name, own in sweeps.moments(span, todo)}
    moments = Moments(fed, 3, HOW.probes, HOW.seed, stored.digest, "c")
    expected = round_plan(stored, plan, moments).rounding
    assert expected is not None
    assert made.digest == replace(expected, moments_digest=work.moments_digest).digest

    class Killed(Exception):
        pass

    def kill(done: int, total: int) -> None:
        if done == 4:
            raise Killed

    killed = replace(work, folder=tmp_path / "two")
    with pytest.raises(Killed):
        round_spans(killed, kill)
    assert len(killed.files.finished()) == 4
    with pytest.raises(ArtifactError, match="no codes of"):
        killed.files.joined()
    damaged = sorted(killed.folder.iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    calls: list[int] = []
    again = round_spans(killed, lambda done, _: calls.append(done))
    assert calls == list(range(4, len(plan.widths) + 1))
    assert again.digest == made.digest
    again.save(tmp_path / "rounding")
    killed.files.remove()
    assert not killed.folder.exists()
    # Codes of other moments are none of this plan's.
    other = replace(work, calibration_digest="d", folder=tmp_path / "one")
    assert other.files.finished() == []


def test_a_run_rounds_a_policy_on_disk_without_a_file_of_moments(
    stored: OftPolicy, tiny_policy: OftPolicy, tiny_observations: Make, tmp_path: Path
) -> None:
    run, w4 = RunFolder(tmp_path), parse_setting("w4")
    drawn = tuple(tiny_observations(6))
    CalibrationSet(drawn[:4], drawn[4:], {"test": 1}).save(run.calibration)
    request = SensitivityRequest(probes=2, quantizer="compensated")
    sensitivities(run, tiny_policy, CPU, request)
    run.moments.unlink()
    plan_setting(run, w4, CPU, stored.digest)
    heard: list[Progress] = []
    made = round_setting(run, w4, stored, on_progress=heard.append)
    kept = round_setting(run, w4, stored, on_progress=heard.append)
    assert not run.moments.exists()
    assert made is not None and kept is not None
    assert made.rounding is not None and kept.rounding is not None
    assert made.rounding.digest == kept.rounding.digest
    assert not run.rounding(w4).with_suffix(".parts").exists()
