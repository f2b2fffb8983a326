"""A policy of any size: held in memory where it fits, else part by part, with the same bundle."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command_runs import Inputs

from calibration.calibration_set import CalibrationSet
from calibration.draw_size import DrawSize, fitting_size
from engines.targets import CPU
from qvla_export.allocation.setting import parse_setting
from qvla_export.measurement.stream_limits import StreamLimits
from qvla_export.pipeline.action_error import HeldOutError
from qvla_export.pipeline.deploy import Deployment, deploy
from qvla_export.pipeline.policy_source import PolicySource, open_checkpoint
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.pipeline.sizing import holding as holding_module
from qvla_export.pipeline.sizing.holding import (
    Holding,
    HoldingOptions,
    HoldingRequest,
    choose_holding,
    open_held,
)
from qvla_export.policies.layers import weights_on_disk
from qvla_export.quantizer.plan import BitPlan
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation

# All observations together, as both ways draw the same probes then.
PART_BY_PART = Holding(resident=False, max_bytes=40_000_000, batch_size=8, layers_per_part=1)


def asked(inputs: Inputs, **options: object) -> HoldingRequest:
    source = PolicySource(str(inputs.checkpoint))
    return HoldingRequest(source, CPU, options=HoldingOptions(**options))  # type: ignore[arg-type]


@pytest.fixture
def free_bytes(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets what the system says is free, before its share is taken."""

    def say(count: int) -> None:
        monkeypatch.setattr(
            "qvla_export.measurement.peak_memory.available_bytes", lambda: int(count / 0.8) + 1
        )

    return say


def test_a_policy_that_fits_is_held_in_memory_and_another_part_by_part(
    inputs: Inputs, free_bytes: Callable[[int], None]
) -> None:
    free_bytes(10_000_000_000)
    held = open_held(asked(inputs))
    assert held.holding.resident and not weights_on_disk(held.policy)
    assert held.holding.layers_per_part is None and held.holding.batch_size == 8
    assert "in memory" in held.holding.describe() and "80 % of what is free" in held.holding.reason
    stored = open_checkpoint(inputs.checkpoint, resident=False)
    weights = 4 * sum(tensor.numel() for tensor in stored.module.state_dict().values())
    assert 3 * weights < 8_000_000
    free_bytes(24_000_000)
    held = open_held(asked(inputs))
    assert not held.holding.resident and weights_on_disk(held.policy)
    assert held.holding.layers_per_part == 1 and held.holding.batch_size <= 8
    assert held.holding.max_bytes == pytest.approx(24_000_000, rel=0.01)
    said = open_held(asked(inputs, layers_per_part=2, batch_size=1)).holding
    assert (said.layers_per_part, said.batch_size) == (2, 1)


def test_fewer_observations_go_together_where_memory_is_short(
    inputs: Inputs, free_bytes: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = open_checkpoint(inputs.checkpoint, resident=False)
    free_bytes(1_000_000)
    with pytest.raises(QvlaError, match="raise it by"):
        choose_holding(asked(inputs), stored)

    def two_fit(*given: object) -> None:
        limits = given[3]
        assert isinstance(limits, StreamLimits)
        if limits.batch_size > 2:
            raise QvlaError("run fewer observations together")

    monkeypatch.setattr("qvla_export.measurement.stream_limits.open_stream", two_fit)
    assert choose_holding(asked(inputs), stored).batch_size == 2
    with pytest.raises(QvlaError, match="fewer"):
        choose_holding(asked(inputs, batch_size=4), stored)


def test_an_interrupted_run_goes_on_as_it_was_held(
    inputs: Inputs, free_bytes: Callable[[int], None]
) -> None:
    free_bytes(10_000_000_000)
    digest = open_checkpoint(inputs.checkpoint, resident=False).digest
    recorded = {"policy_digest": digest, "holding": PART_BY_PART.to_json()}
    again = replace(asked(inputs), recorded=json.loads(json.dumps(recorded)))
    held = open_held(again).holding
    assert replace(held, reason="") == PART_BY_PART and held.reason == "as this run began"
    others = [
        replace(again, options=HoldingOptions(batch_size=4)),
        replace(again, options=HoldingOptions(max_memory_gb=9)),
        replace(again, recorded={**recorded, "policy_digest": "other"}),
        replace(again, recorded={**recorded, "holding": {"of": "another version"}}),
        replace(again, recorded={"policy_digest": digest}),
    ]
    assert all(open_held(other).holding.resident for other in others)
    free_bytes(24_000_000)
    assert open_held(again).holding.reason != "as this run began"


def test_bounds_and_devices_that_cannot_be_had_are_refused(inputs: Inputs) -> None:
    with pytest.raises(QvlaError, match=r"--max-memory-gb must be above 0\.128"):
        open_held(asked(inputs, max_memory_gb=0.1))
    with pytest.raises(QvlaError, match="--device cuda needs an NVIDIA GPU"):
        open_held(asked(inputs, device="cuda"))
    with pytest.raises(QvlaError, match=r"--check-pairs 9.*whole policy in memory.*too large"):
        replace(PART_BY_PART, reason="too large").require_whole_for(
            {"--check-pairs 9": True, "--episodes 0": False}
        )
    assert holding_module.IN_MEMORY.resident


@pytest.mark.slow
def test_a_policy_read_part_by_part_gives_the_same_plan_and_a_bundle_in_parts(
    inputs: Inputs,
    tiny_observations: Callable[..., list[Observation]],
    tmp_path: Path,
) -> None:
    drawn, found = tuple(tiny_observations(8)), {}
    for name, held in (("whole", Holding()), ("parts", PART_BY_PART)):
        run = RunFolder(tmp_path / name)
        CalibrationSet(drawn[:5], drawn[5:], {"mine": True}).save(run.calibration)
        request = Deployment(
            run,
            PolicySource(str(inputs.checkpoint), threads=1),
            (parse_setting("w4"),),
            "orin-jp7",
            check_pairs=0,
            samples=3,
            holding=held,
        )
        policy = open_checkpoint(inputs.checkpoint, resident=held.resident)
        deploy(request, policy)
        found[name] = run
    w4 = parse_setting("w4")
    plans = [BitPlan.load(run.plan(w4)) for run in found.values()]
    for layer, widths in plans[0].widths.items():
        assert (plans[1].widths[layer] != widths).mean() < 0.02, layer
    bundles = [Bundle.load(run.bundle(w4)) for run in found.values()]
    assert len(bundles[0].parts) == 1 and len(bundles[1].parts) == 6
    errors = [HeldOutError.load(run.action_error(w4)).rms for run in found.values()]
    np.testing.assert_allclose(errors[1], errors[0], rtol=0.3)


@pytest.mark.parametrize(
    ("lengths", "wish", "fixed", "size"),
    [
        # Enough is drawn as it was asked for.
        ([9] * 64, DrawSize(64, 64, 2), False, DrawSize(64, 64, 2)),
        # 20 demonstrations: more frames of each.
        ([50] * 20, DrawSize(64, 64, 2), False, DrawSize(64, 64, 7)),
        # Frames that were named stay; fewer observations are drawn.
        ([50] * 20, DrawSize(64, 64, 2), True, DrawSize(20, 20, 2)),
        # All that there is, shared out as it was asked for.
        ([3, 4, 5], DrawSize(20, 10, 2), False, DrawSize(7, 5, 5)),
        ([1, 1], DrawSize(64, 64, 2), False, DrawSize(1, 1, 2)),
        # Too few to hold any out: refused by who draws.
        ([50], DrawSize(64, 64, 2), False, DrawSize(64, 64, 2)),
    ],
)
def test_a_small_data_set_gives_what_it_has(
    lengths: list[int], wish: DrawSize, fixed: bool, size: DrawSize
) -> None:
    assert fitting_size(lengths, wish, fixed) == size
