"""Smoothing: the same actions in float, smaller errors where inputs are rounded."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from command_runs import qvla
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_policy import write_tiny_checkpoint
from torch import Tensor

from calibration.calibration_set import CalibrationSet
from engines.targets import find_target
from qvla_export.measurement.smoothing import input_maxima, smoothed, smoothing_error
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.policies.layers import traced_layers
from qvla_export.policies.oft.policy import OftPolicy, load_oft_policy
from qvla_export.policies.prismatic.smoothing import find_migrations, write_smoothed
from qvla_export.policies.smoothing import Migration, smoothed_tensors, smoothing_factors
from qvla_export.shared.errors import CheckpointError, QvlaError
from qvla_export.shared.observation import Observation

Observations = Callable[..., list[Observation]]


def actions(policy: OftPolicy, observations: list[Observation]) -> Tensor:
    with torch.no_grad():
        return torch.cat([policy.normalized_actions(policy.batch([o])) for o in observations])


def factors_of(
    policy: OftPolicy, observations: list[Observation], strength: float, powers_of_two: bool
) -> dict[Migration, Tensor]:
    maxima = input_maxima(policy, observations)
    migrations = find_migrations(policy.module.arch)
    return smoothing_factors(policy.module, migrations, maxima, strength, powers_of_two)


@given(strength=st.floats(0, 1))
@examples(max_examples=10)
def test_actions_stay(
    tiny_policy: OftPolicy, tiny_observations: Observations, strength: float
) -> None:
    seen = tiny_observations(3)
    wanted = actions(tiny_policy, seen)
    for powers_of_two, tolerance in ((True, 0), (False, 1e-5)):
        factors = factors_of(tiny_policy, seen, strength, powers_of_two)
        with smoothed(tiny_policy.module, factors):
            found = actions(tiny_policy, seen)
        torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)
    assert torch.equal(actions(tiny_policy, seen), wanted)  # the weights have returned


def test_every_linear_input_but_those_of_gelu_can_be_smoothed(
    tiny_policy: OftPolicy, tiny_observations: Observations
) -> None:
    found = factors_of(tiny_policy, tiny_observations(2), 0.5, False)
    reached = {name for migration in found for name in migration.consumers}
    linear = {n for n, m in traced_layers(tiny_policy).items() if isinstance(m, torch.nn.Linear)}
    assert linear - reached == {name for name in linear if name.endswith("fc2")}
    for migration, factor in found.items():
        assert torch.isfinite(factor).all() and (factor > 0).all(), migration


def test_an_outlier_costs_less_once_smoothed(
    tiny_checkpoint: Path, tiny_observations: Observations
) -> None:
    policy = load_oft_policy(tiny_checkpoint)
    target, seen = find_target("cpu"), tiny_observations(4)
    # One element of an input becomes 100 times the others, and nothing else changes.
    name = "language_model.model.layers.0.post_attention_layernorm"
    mlp = tuple(f"language_model.model.layers.0.mlp.{part}_proj" for part in ("gate", "up"))
    outlier = torch.ones(64)
    outlier[5] = 1 / 100
    made = {Migration(name, mlp): outlier}
    with smoothed(policy.module, made):
        before = smoothing_error(policy, {}, seen, "0" * 64, target)
        factors = factors_of(policy, seen, 0.5, powers_of_two=True)
        after = smoothing_error(policy, factors, seen, "0" * 64, target)
        assert float(factors[Migration(name, mlp)].argmax()) == 5
    assert after < before / 3


def test_a_smoothed_checkpoint_acts_bit_for_bit_as_before(
    tiny_checkpoint: Path, tiny_policy: OftPolicy, tiny_observations: Observations, tmp_path: Path
) -> None:
    seen = tiny_observations(3)
    factors = factors_of(tiny_policy, seen, 0.5, powers_of_two=True)
    tensors = smoothed_tensors(tiny_policy.module, factors)
    output = tmp_path / "smooth"
    write_smoothed(tiny_checkpoint, output, tensors, keep_types=True)
    loaded = load_oft_policy(output)
    assert torch.equal(actions(loaded, seen), actions(tiny_policy, seen))
    assert loaded.digest != tiny_policy.digest
    before, after = (load_file(p / "model.safetensors") for p in (tiny_checkpoint, output))
    assert {k: v.dtype for k, v in before.items()} == {k: v.dtype for k, v in after.items()}
    assert {p.name for p in output.iterdir()} == {p.name for p in tiny_checkpoint.iterdir()}


def test_a_sharded_checkpoint_stays_sharded(
    tiny_policy: OftPolicy, tiny_observations: Observations, tmp_path: Path
) -> None:
    seen = tiny_observations(2)
    factors = factors_of(tiny_policy, seen, 0.6, powers_of_two=False)
    source = shards(write_tiny_checkpoint(tmp_path / "sharded"))
    output = tmp_path / "smooth"
    tensors = smoothed_tensors(tiny_policy.module, factors)
    write_smoothed(source, output, tensors, keep_types=False)
    index = json.loads((output / "model.safetensors.index.json").read_text())
    stored = [load_file(path) for path in sorted(output.glob("*.safetensors"))]
    assert index["metadata"]["total_size"] == sum(t.nbytes for f in stored for t in f.values())
    wanted = actions(load_oft_policy(source), seen)
    found = actions(load_oft_policy(output), seen)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def shards(checkpoint: Path) -> Path:
    """Cut a checkpoint's weights into two files with an index."""
    whole = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    names = sorted(whole)
    index: dict[str, Mapping[str, object]] = {"metadata": {"total_size": 0}}
    places = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: whole[name] for name in part}, checkpoint / file)
        places.update(dict.fromkeys(part, file))
    (checkpoint / "model.safetensors.index.json").write_text(
        json.dumps({**index, "weight_map": places})
    )
    return checkpoint


def test_nothing_is_written_over_or_left_out(
    tiny_checkpoint: Path, tiny_policy: OftPolicy, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="itself"):
        write_smoothed(tiny_checkpoint, tiny_checkpoint, {}, keep_types=True)
    with pytest.raises(CheckpointError, match="does not hold"):
        write_smoothed(tiny_checkpoint, tmp_path / "x", {"no.weight": torch.ones(1)}, True)
    assert not (tmp_path / "x").exists()
    with pytest.raises(QvlaError, match="at least one observation"):
        input_maxima(tiny_policy, [])
    with pytest.raises(QvlaError, match="strength"):
        smoothing_factors(tiny_policy.module, [], {}, 1.5)


def test_the_command_picks_the_best_strength(
    tiny_checkpoint: Path, tiny_observations: Observations, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    seen = tiny_observations(4)
    CalibrationSet(tuple(seen[:3]), tuple(seen[3:]), {"test": 1}).save(run.calibration)
    output = tmp_path / "smooth"
    done = qvla("smooth", output, "--run", run.root, "--policy", tiny_checkpoint)
    assert done.code == 0, done.err
    lines = [line for line in done.out.splitlines() if line.startswith("strength")]
    errors = {float(line.split()[1].rstrip(":")): float(line.split()[4]) for line in lines}
    best = float(done.out.split("smoothed by ")[1].split(";")[0])
    assert len(errors) == 5 and errors[best] == min(errors.values())
    torch.testing.assert_close(
        actions(load_oft_policy(output), seen),
        actions(load_oft_policy(tiny_checkpoint), seen),
        rtol=0,
        atol=1e-5,
    )
