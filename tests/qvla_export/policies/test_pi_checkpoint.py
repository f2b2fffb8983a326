"""pi0 and pi0.5 checkpoints of openpi's layout: what is read, what is refused, what acts."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from openvla_cases import copied
from pi_cases import INSTRUCTIONS, SLOTS, pi_observations, write_tiny_pi
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from qvla_export.latency_model.flow_shape import shape_of
from qvla_export.policies.families import describe_checkpoint, load_policy, recognize
from qvla_export.policies.layers import layer_shapes
from qvla_export.policies.pi.config import PROMPT
from qvla_export.policies.pi.policy import PiPolicy, load_pi_policy
from qvla_export.shared.errors import (
    ArtifactError,
    CheckpointError,
    InvalidObservation,
    QvlaError,
    StatisticsError,
)
from qvla_export.shared.inputs.noise import NoiseSpec
from qvla_export.shared.lerobot.lerobot_statistics import checkpoint_statistics
from qvla_export.shared.observation import Observation
from qvla_export.shared.policy_interface import load_interface

EXPERT = "paligemma_with_expert.gemma_expert.model.layers.1.mlp.gate_proj.weight"
# What PCG64's stream gives for a black pixel and "go".
STILL_NOISE = (1.7509497, 1.1463407, 0.2412102)
UNREAD = "paligemma_with_expert.gemma_expert.lm_head.weight"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    folder = tmp_path_factory.mktemp("pi")
    return {adaptive: write_tiny_pi(folder / f"{adaptive}", adaptive) for adaptive in (False, True)}


@pytest.fixture(scope="module", params=[False, True], ids=["pi0", "pi05"])
def checkpoint(request: pytest.FixtureRequest, checkpoints: dict[bool, Path]) -> Path:
    return checkpoints[request.param]


@pytest.fixture(scope="module")
def policy(checkpoint: Path) -> PiPolicy:
    return load_pi_policy(checkpoint)


def test_a_checkpoint_is_recognized_and_acts(checkpoint: Path, policy: PiPolicy) -> None:
    assert recognize(checkpoint).name == "pi"
    loaded = load_policy(checkpoint)
    assert loaded.digest == policy.digest
    assert load_interface(checkpoint).cameras == SLOTS[:2]
    found = describe_checkpoint(checkpoint)
    assert f": pi0{'.5' if policy.config.adaptive else ''}, 4 actions of 7" in found
    assert "assumed" not in found
    # What a robot's check reads, without torch.
    seen = checkpoint_statistics(checkpoint, None, load_interface(checkpoint), "none")
    ours = policy.processor.statistics
    assert seen.key == ours.key == "tiny"
    np.testing.assert_array_equal(seen.action.scale(), ours.action.scale())
    first, second = pi_observations(2)
    chunk = policy.infer(first)
    assert chunk.actions.shape == (4, 7)
    again = loaded.infer(first)
    np.testing.assert_array_equal(chunk.actions, again.actions)
    assert not np.allclose(chunk.actions, policy.infer(second).actions)
    limits = policy.processor.statistics.action
    np.testing.assert_allclose(chunk.actions, limits.unnormalize(chunk.normalized), rtol=1e-6)


def test_every_assumed_field_is_said(checkpoint: Path, policy: PiPolicy, tmp_path: Path) -> None:
    prompt, tokens = policy.config.prompt, policy.config.max_prompt_tokens
    rest = f"vision_heads 16, flow_steps 10, prompt {prompt!r}, max_prompt_tokens {tokens}"
    rest += ", relative_actions none"
    assert describe_checkpoint(checkpoint, preset="libero").endswith(f"; assumed: {rest}")
    folder = copied(checkpoint, tmp_path / "c")
    (folder / "qvla_policy.json").unlink()
    assert describe_checkpoint(folder).endswith(f"; assumed: cameras {'/'.join(SLOTS)}, {rest}")


def test_one_of_several_assets_can_be_described(checkpoint: Path, tmp_path: Path) -> None:
    folder = copied(checkpoint, tmp_path / "c")
    (folder / "assets").chmod(0o755)
    shutil.copytree(folder / "assets" / "tiny", folder / "assets" / "other")
    assert "4 actions of 7" in describe_checkpoint(folder, "other")
    assert load_interface(folder, unnorm_key="other").action_dim == 7
    with pytest.raises(StatisticsError, match="several assets"):
        describe_checkpoint(folder)


def test_pi05_without_the_state_in_its_prompt(
    checkpoints: dict[bool, Path], tmp_path: Path
) -> None:
    """As openpi's pi05_libero: `discrete_state_input` is off, which no file says."""
    folder = copied(checkpoints[True], tmp_path / "c")
    rewritten(folder / "qvla_policy.json", lambda v: v.update(prompt=PROMPT[False]))
    first, second = pi_observations(1)[0], pi_observations(1, seed=1)[0]
    policy = load_policy(folder)
    feeds = policy.processor.feeds(first)
    assert "state" not in feeds
    words = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(f"{INSTRUCTIONS[0]}\n").ids
    assert feeds["input_ids"][0].tolist() == words
    moved = policy.processor.feeds(replace(first, state=second.state))
    np.testing.assert_array_equal(moved["input_ids"], feeds["input_ids"])
    stated = load_policy(checkpoints[True]).processor
    assert len(stated.feeds(first)["input_ids"][0]) > len(words)


def test_its_latency_can_be_predicted(checkpoint: Path, policy: PiPolicy) -> None:
    """Every layer has rows, found from names and headers alone."""
    inputs = recognize(checkpoint).inputs(checkpoint, None)
    network = shape_of(layer_shapes(policy.layers()), inputs)
    assert set(policy.layers()) <= set(network.layers)
    assert [part.runs for part in network.parts] == [1, 1, 4]
    rows = {layer.name: layer.rows for part in network.parts for layer in part.layers}
    assert rows["vision_tower.encoder.layers.0.mlp.fc1"] == 2 * policy.module.arch.image_tokens
    assert rows["action_expert.layers.0.mlp.up_proj"] == (4 if policy.config.adaptive else 5)


def test_a_batch_acts_as_its_observations(policy: PiPolicy) -> None:
    """Prompts of different length, each with the noise of its own."""
    observations = pi_observations(3)
    batch = policy.batch(observations)
    assert batch.prompt_lengths is not None and len(set(batch.prompt_lengths.tolist())) > 1
    alone = torch.cat([policy.greedy_actions(policy.batch([one])) for one in observations])
    torch.testing.assert_close(policy.greedy_actions(batch), alone, rtol=0, atol=1e-5)


def test_every_input_moves_the_actions(policy: PiPolicy) -> None:
    (seen,) = pi_observations(1)
    other = pi_observations(1, seed=9)[0]
    plain = policy.infer(seen).normalized
    images = {**seen.images, SLOTS[1]: other.images[SLOTS[1]]}
    noise = policy.processor.spec.noise
    assert noise is not None
    spec = replace(policy.processor.spec, noise=replace(noise, seed=1))
    moved = [
        policy.infer(replace(seen, images=images)).normalized,
        policy.infer(replace(seen, state=other.state)).normalized,
        policy.infer(replace(seen, instruction="close the window")).normalized,
        replace(policy, processor=replace(policy.processor, spec=spec)).infer(seen).normalized,
    ]
    assert all(np.abs(each - plain).max() > 1e-3 for each in moved)


def test_gradients_reach_every_layer_through_all_steps(policy: PiPolicy) -> None:
    layers = policy.layers()
    kinds = {name.split(".")[0] for name in layers}
    assert kinds == {"vision_tower", "language_model", "action_expert"}
    assert not [name for name in layers if name.endswith("dense")]
    # The last block of the language model: its keys and values alone.
    last = [name for name in layers if name.startswith("language_model.layers.1.")]
    assert [name.rsplit(".", 1)[1] for name in last] == ["k_proj", "v_proj"]
    calls: list[str] = []
    name = "action_expert.layers.1.mlp.down_proj"
    handle = layers[name].register_forward_hook(lambda *_: calls.append(name))
    policy.greedy_actions(policy.batch(pi_observations(1)))
    handle.remove()
    assert len(calls) == 4


def test_an_absent_camera_is_as_if_it_were_not_there(tmp_path: Path) -> None:
    """Masked images move no position and are seen by nobody."""
    three = write_tiny_pi(tmp_path / "three", cameras=SLOTS, optional_cameras=SLOTS[1:])
    two = write_tiny_pi(tmp_path / "two", cameras=(SLOTS[0], SLOTS[2]))
    (seen,) = pi_observations(1, cameras=(SLOTS[0], SLOTS[2]))
    masked = load_pi_policy(three)
    expected = load_pi_policy(two).infer(seen).normalized
    np.testing.assert_allclose(masked.infer(seen).normalized, expected, rtol=0, atol=1e-5)
    with pytest.raises(InvalidObservation, match="missing"):
        load_pi_policy(two).infer(replace(seen, images={SLOTS[0]: seen.images[SLOTS[0]]}))
    with pytest.raises(InvalidObservation, match="missing"):
        masked.infer(replace(seen, images={SLOTS[2]: seen.images[SLOTS[2]]}))


def test_noise_is_of_the_observation() -> None:
    spec = NoiseSpec("noise", (50, 32))
    first, second = pi_observations(2)
    drawn = spec.draw(first)
    assert drawn.shape == (1, 50, 32) and drawn.dtype == np.float32
    np.testing.assert_array_equal(drawn, spec.draw(replace(first)))
    assert abs(drawn.mean()) < 0.1 and abs(drawn.std() - 1) < 0.05 and np.abs(drawn).max() < 6
    for other in (
        spec.draw(second),
        replace(spec, seed=1).draw(first),
        spec.draw(replace(first, instruction="other")),
        spec.draw(replace(first, state=first.state + np.float32(1))),
    ):
        assert abs(np.corrcoef(drawn.ravel(), other.ravel())[0, 1]) < 0.1
    # What a robot of another version draws must be the same: PCG64's stream is fixed.
    still = Observation({"a": np.zeros((1, 1, 3), np.uint8)}, "go")
    np.testing.assert_allclose(
        NoiseSpec("noise", (3,)).draw(still)[0], STILL_NOISE, rtol=0, atol=1e-6
    )


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(EXPERT), rf"missing \(1\): \['{EXPERT}'\]"),
        (lambda t: t.pop(UNREAD), "missing"),
        (lambda t: t.update(extra=torch.zeros(2)), r"unexpected \(1\): \['extra'\]"),
        (lambda t: t.update({EXPERT: t[EXPERT][:-1].clone()}), "wrong shape"),
        (lambda t: t.update({EXPERT: t[EXPERT] * float("nan")}), "NaN"),
        (lambda t: t.pop("action_in_proj.weight"), "weights are missing"),
        (lambda t: t.update({EXPERT: t[EXPERT].to(torch.int8)}), "quantized"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    checkpoints: dict[bool, Path],
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor]], object],
    message: str,
) -> None:
    folder = copied(checkpoints[False], tmp_path / "c")
    changed(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load_pi_policy(folder)


def test_weights_that_never_arrived_are_refused(
    checkpoints: dict[bool, Path], tmp_path: Path
) -> None:
    folder = copied(checkpoints[True], tmp_path / "c")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="not a complete safetensors"):
        load_pi_policy(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match="weights not found"):
        load_pi_policy(folder)


def rewritten(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def test_other_files_that_do_not_fit_are_refused(
    checkpoints: dict[bool, Path], tmp_path: Path
) -> None:
    folder = copied(checkpoints[True], tmp_path / "c")
    (folder / "assets").chmod(0o755)
    statistics = folder / "assets" / "tiny" / "norm_stats.json"

    def refused(error: type[QvlaError], message: str) -> None:
        with pytest.raises(error, match=message):
            load_pi_policy(folder)

    whole = statistics.read_text()
    rewritten(statistics, lambda v: v["norm_stats"]["actions"].pop("q01"))  # type: ignore[index]
    refused(StatisticsError, "lacks")
    rewritten(statistics, lambda v: v["norm_stats"].pop("actions"))  # type: ignore[attr-defined]
    refused(ArtifactError, "actions")
    statistics.write_text(whole.replace("-8.0", "NaN"))
    refused(ArtifactError, "finite|NaN")
    statistics.write_text(whole)
    (folder / "assets" / "other").mkdir()
    (folder / "assets" / "other" / "norm_stats.json").write_text(whole)
    refused(StatisticsError, "several assets")
    assert load_pi_policy(folder, "other").processor.statistics.key == "other"
    with pytest.raises(StatisticsError, match="Did you mean 'tiny'"):
        load_pi_policy(folder, "tin")
    (folder / "assets" / "other" / "norm_stats.json").unlink()
    (folder / "tokenizer.json").rename(folder / "elsewhere")
    refused(CheckpointError, "paligemma-3b-pt-224")
    (folder / "elsewhere").rename(folder / "tokenizer.json")
    (folder / "extra.safetensors").write_bytes(b"")
    refused(CheckpointError, "extra.safetensors")
    (folder / "extra.safetensors").unlink()
    rewritten(folder / "qvla_policy.json", lambda v: v.update(flow_steps=0))
    refused(CheckpointError, "1 to 200 steps")
    rewritten(folder / "qvla_policy.json", lambda v: v.update(flow_steps=4, speed=2))
    refused(CheckpointError, "speed")
    (folder / "qvla_policy.json").unlink()
    refused(CheckpointError, "write vision_heads")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vision_heads", "4"),
        ("prompt_state_width", -1),
        ("prompt_state_width", 1 << 30),
        ("max_prompt_tokens", 0),
        ("noise_seed", 0.5),
        ("prompt", "move"),
        ("prompt", 5),
        ("optional_cameras", "base_0_rgb"),
        ("min_period", "short"),
        ("max_period", None),
        ("max_period", 0.001),
        ("adapt_to_pi", True),
        ("adapt_to_pi", 1),
        ("relative_actions", [0, 7]),
        ("relative_actions", [0, 0]),
        ("relative_actions", [-1]),
        ("relative_actions", "0"),
    ],
)
def test_values_that_no_policy_has_are_refused(
    name: str, value: object, checkpoints: dict[bool, Path], tmp_path: Path
) -> None:
    folder = copied(checkpoints[False], tmp_path / "c")
    rewritten(folder / "qvla_policy.json", lambda v: v.update({name: value}))
    for read in (describe_checkpoint, load_policy):
        with pytest.raises((CheckpointError, ArtifactError), match=name):
            read(folder)


def test_prompts_are_never_cut(policy: PiPolicy) -> None:
    with pytest.raises(InvalidObservation, match="say it in fewer words"):
        policy.infer(replace(pi_observations(1)[0], instruction="very slowly " * 200))
