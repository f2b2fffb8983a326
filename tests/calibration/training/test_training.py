"""Imitation training: it learns, refuses what does not fit, and goes on exactly after any kill."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from places import HELPERS, ROOT
from small_datasets import INSTRUCTIONS, write_small_dataset
from small_training import CONFIG, SIZE

from calibration.sources.lerobot import LeRobotDataset
from calibration.training.train import REFERENCE_CONFIG, train_policy
from calibration.training.trainer import Trainer, normalize_pixels
from calibration.training.training_data import load_frames
from qvla_export.policies.oft.policy import OftPolicy, load_oft_policy
from qvla_export.policies.prismatic.new_checkpoint import PAD_ID, SUFFIX_ID
from qvla_export.shared.artifacts import sha256_tree
from qvla_export.shared.errors import ArtifactError, ArtifactMismatch, QvlaError
from qvla_export.shared.images import pixel_values
from qvla_export.shared.observation import Observation
from qvla_export.shared.processor import OPENVLA_PROMPT

LENGTHS = (9, 12, 7)
TRAIN = """
import sys
from pathlib import Path
import torch
from small_training import CONFIG, SIZE
from calibration.training.train import train_policy
torch.set_num_threads(1)
train_policy(Path(sys.argv[1]), Path(sys.argv[2]), SIZE, CONFIG, "small")
"""


@pytest.fixture(scope="module")
def demos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_dataset(tmp_path_factory.mktemp("training") / "demos", LENGTHS)


@pytest.fixture(scope="module")
def trained(demos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that nothing interrupted."""
    output = tmp_path_factory.mktemp("trained") / "run"
    assert train_policy(demos, output, SIZE, CONFIG, "small") == output / "checkpoint"
    return output


def test_loss_goes_down_when_overfitting(demos: Path) -> None:
    frames = load_frames(LeRobotDataset(demos), REFERENCE_CONFIG, "small", SIZE.vocab_size)
    calm = replace(CONFIG, steps=60, batch_size=len(frames), color_jitter=0.0, state_dropout=0.0)
    trainer = Trainer(frames, SIZE, calm)
    losses = [trainer.train_step() for _ in range(60)]
    for name in ("action_l1", "goal_l1"):
        assert losses[-1][name] < 0.6 * losses[0][name]


@pytest.mark.slow  # it compiles for a minute
# torch's compiler does itself what torch warns of.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_network_goes_on_as_the_plain_one(demos: Path) -> None:
    frames = load_frames(LeRobotDataset(demos), REFERENCE_CONFIG, "small", SIZE.vocab_size)
    plain, compiled = (Trainer(frames, SIZE, replace(CONFIG, compiled=c)) for c in (False, True))
    plain.train_step()
    compiled.load_state_dict(copy.deepcopy(plain.state_dict()))
    for _ in range(3):
        expected, losses = plain.train_step(), compiled.train_step()
        assert losses == pytest.approx(expected, rel=1e-4)


def test_a_training_is_not_called_shorter_than_it_was(demos: Path, trained: Path) -> None:
    before = sha256_tree(trained)
    with pytest.raises(QvlaError, match=r"is trained for 12 steps, more than the 9 asked for"):
        train_policy(demos, trained, SIZE, replace(CONFIG, steps=9), "small")
    assert sha256_tree(trained) == before


def test_samples_are_what_the_policy_will_see(demos: Path) -> None:
    dataset = LeRobotDataset(demos)
    frames = load_frames(dataset, REFERENCE_CONFIG, "small", SIZE.vocab_size)
    assert len(frames) == sum(LENGTHS)
    statistics = frames.statistics["small"]
    episodes = [dataset.episode(i) for i in range(3)]
    for name, part in (("action", "action"), ("proprio", "state")):
        values = np.concatenate([getattr(e, part) for e in episodes])
        for quantile in (1, 99):
            expected = np.quantile(values, quantile / 100, axis=0)
            np.testing.assert_allclose(statistics[name][f"q{quantile:02d}"], expected, rtol=1e-6)
        assert statistics[name]["mask"] == [True] * 4
    assert (statistics["num_transitions"], statistics["num_trajectories"]) == (sum(LENGTHS), 3)
    # A chunk is the next actions; past an episode's end the last one repeats.
    assert frames.chunks.shape == (sum(LENGTHS), 8, 4)
    assert torch.equal(frames.chunks[0, 1], frames.chunks[1, 0])
    last = LENGTHS[0] - 1
    assert all(torch.equal(frames.chunks[last, k], frames.chunks[last, 0]) for k in range(8))
    # The goal is where the hand ends in its own episode.
    assert torch.equal(frames.goals[0], frames.states[last, :3])
    assert torch.equal(frames.goals[last], frames.goals[0])
    assert not torch.equal(frames.goals[last + 1], frames.goals[0])


def test_prompts_are_openvlas(demos: Path) -> None:
    frames = load_frames(LeRobotDataset(demos), REFERENCE_CONFIG, "small", SIZE.vocab_size)
    for first, instruction in zip((0, 9, 21), INSTRUCTIONS, strict=True):
        row = frames.prompt_index[first]
        ids = frames.prompts[row, : frames.prompt_lengths[row]].tolist()
        assert ids[-1] == SUFFIX_ID
        text = frames.tokenizer.decode(ids[:-1])
        assert text == OPENVLA_PROMPT.format(instruction=instruction)
        assert (frames.prompts[row, frames.prompt_lengths[row] :] == PAD_ID).all()


def test_the_checkpoint_is_a_policy(trained: Path, demos: Path) -> None:
    policy = load_oft_policy(trained / "checkpoint")
    image = np.full((28, 28, 3), 90, np.uint8)
    chunk = policy.infer(Observation({"image": image}, INSTRUCTIONS[0], np.zeros(4, np.float32)))
    assert chunk.actions.shape == (8, 4)
    assert np.isfinite(chunk.actions).all()
    statistics = json.loads((trained / "checkpoint/dataset_statistics.json").read_text())
    frames = load_frames(LeRobotDataset(demos), REFERENCE_CONFIG, "small", SIZE.vocab_size)
    assert statistics == frames.statistics
    tokenizer = policy.processor.tokenizer
    assert tokenizer is not None and tokenizer.to_str() == frames.tokenizer.to_str()
    about = json.loads((trained / "training.json").read_text())
    assert about["frames"] == sum(LENGTHS)
    assert about["episodes"] == 3
    assert about["config"]["seed"] == 1


def test_the_policy_sees_what_training_saw(demos: Path, trained: Path) -> None:
    """Prompt, image and state of a recorded frame take the same way to the actions in both."""
    dataset = LeRobotDataset(demos)
    frames = load_frames(dataset, REFERENCE_CONFIG, "small", SIZE.vocab_size)
    policy = load_oft_policy(trained / "checkpoint")
    module = policy.module
    for index in (0, 13):
        row = frames.prompt_index[index]
        length = frames.prompt_lengths[row][None]
        ids = frames.prompts[row : row + 1, : length[0]]
        with torch.no_grad():
            patches = module.projector(
                module.vision_backbone(normalize_pixels(frames.images[index : index + 1]))
            )
            embeddings = module.embed(patches, ids, frames.states[index : index + 1], length)
            mask = module.padding_mask(embeddings, ids, length)
            hidden = module.language_model(embeddings, mask)
            expected = module.act(module.action_hidden(hidden, ids, length))[0].numpy()
        got = policy.infer(dataset[index].observation).normalized
        np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("step", [3, 8])
def test_an_interrupted_training_goes_on_bit_for_bit(
    demos: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", _interrupted_at(step))
        with pytest.raises(KeyboardInterrupt):
            train_policy(demos, output, SIZE, CONFIG, "small")
    train_policy(demos, output, SIZE, CONFIG, "small")
    assert sha256_tree(output / "checkpoint") == sha256_tree(trained / "checkpoint")
    log = [json.loads(line) for line in (output / "training_log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [12]


def _interrupted_at(step: int) -> Callable[[Trainer], dict[str, float]]:
    train_step = Trainer.train_step

    def stop(trainer: Trainer) -> dict[str, float]:
        if trainer.step + 1 == step:
            raise KeyboardInterrupt
        return train_step(trainer)

    return stop


def test_a_killed_training_goes_on_bit_for_bit(demos: Path, trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HELPERS}"}
    command = [sys.executable, "-W", "ignore", "-c", TRAIN, str(demos), str(output)]
    running = subprocess.Popen(command, env=environment)
    while not (output / "training_state.pt").exists():
        assert running.poll() is None
        time.sleep(0.001)
    running.send_signal(signal.SIGKILL)
    running.wait()
    train_policy(demos, output, SIZE, CONFIG, "small")
    assert sha256_tree(output / "checkpoint") == sha256_tree(trained / "checkpoint")
    names = {path.name for path in output.iterdir()}
    assert names == {"checkpoint", "training.json", "training_log.jsonl", "training_state.pt"}


def test_a_finished_training_without_its_checkpoint_cannot_be(
    demos: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state is written after the checkpoint, so a kill between them loses nothing."""
    output = tmp_path / "run"
    real = Path.replace

    def die(path: Path, target: Path) -> Path:
        if target.name == "training_state.pt":
            raise KeyboardInterrupt
        return real(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            train_policy(demos, output, SIZE, replace(CONFIG, save_every_steps=12), "small")
    assert (output / "checkpoint").is_dir()
    train_policy(demos, output, SIZE, replace(CONFIG, save_every_steps=12), "small")
    assert sha256_tree(output / "checkpoint") == sha256_tree(trained / "checkpoint")


def test_a_finished_training_is_left_alone(demos: Path, trained: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    train_policy(demos, trained, SIZE, CONFIG, "small")
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 2}, "seed=1, asked for 2"),
        ({"batch_size": 4}, "batch_size=8, asked for 4"),
        ({"learning_rate": 1e-3}, "learning_rate"),
        ({"precision": "bf16"}, "precision=fp32"),
    ],
)
def test_other_settings_do_not_continue(
    demos: Path, trained: Path, change: dict[str, object], message: str
) -> None:
    before = sha256_tree(trained)
    with pytest.raises(ArtifactMismatch, match=message):
        train_policy(demos, trained, SIZE, replace(CONFIG, **change), "small")  # type: ignore[arg-type]
    assert sha256_tree(trained) == before


def test_another_network_or_other_data_do_not_continue(
    demos: Path, trained: Path, tmp_path: Path
) -> None:
    with pytest.raises(ArtifactMismatch, match="depth=1, asked for 2"):
        train_policy(demos, trained, replace(SIZE, depth=2), CONFIG, "small")
    other = write_small_dataset(tmp_path / "demos", (9, 12, 8))
    with pytest.raises(ArtifactMismatch, match="data="):
        train_policy(other, trained, SIZE, CONFIG, "small")


def test_more_steps_continue(demos: Path, trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    train_policy(demos, output, SIZE, replace(CONFIG, steps=2), "small")
    first = sha256_tree(output / "checkpoint")
    train_policy(demos, output, SIZE, CONFIG, "small")
    assert sha256_tree(output / "checkpoint") not in (first, None)
    assert json.loads((output / "training.json").read_text())["config"]["steps"] == 12


@pytest.mark.parametrize("kept", [0, 100, -100])
def test_a_damaged_state_is_named(demos: Path, trained: Path, tmp_path: Path, kept: int) -> None:
    (tmp_path / "training_state.pt").write_bytes(
        (trained / "training_state.pt").read_bytes()[:kept]
    )
    with pytest.raises(ArtifactError, match=r"training_state\.pt .*remove it"):
        train_policy(demos, tmp_path, SIZE, CONFIG, "small")


def test_an_old_state_is_named(demos: Path, tmp_path: Path) -> None:
    torch.save({"step": 3}, tmp_path / "training_state.pt")
    with pytest.raises(ArtifactError, match=r"lacks \['averaged', .* remove it"):
        train_policy(demos, tmp_path, SIZE, CONFIG, "small")


def test_data_that_do_not_fit_are_refused(demos: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    bigger = replace(SIZE, image_size=42)
    with pytest.raises(QvlaError, match=r"42 x 42 pixels, the data set's are 28 x 28"):
        train_policy(demos, output, bigger, CONFIG, "small")
    with pytest.raises(QvlaError, match=r"takes 64 frames, the data set has 28; .*smaller batch"):
        train_policy(demos, output, SIZE, replace(CONFIG, batch_size=64), "small")
    with pytest.raises(QvlaError, match="vocabulary of 200 is too small"):
        train_policy(demos, output, replace(SIZE, vocab_size=200), CONFIG, "small")
    seven = write_small_dataset(tmp_path / "seven", (9,), dims=7)
    with pytest.raises(QvlaError, match=r"action has 4 numbers, .* has 7"):
        train_policy(seven, output, SIZE, CONFIG, "small")
    with pytest.raises(ArtifactError, match="not found"):
        train_policy(tmp_path / "nowhere", output, SIZE, CONFIG, "small")
    assert not output.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"precision": "fp8"},
        {"steps": 0},
        {"batch_size": 0},
        {"warmup_steps": 0},
        {"save_every_steps": 0},
        {"seed": -1},
    ],
)
def test_impossible_settings_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(QvlaError, match=next(iter(change))):
        replace(CONFIG, **change)  # type: ignore[arg-type]


def test_training_sees_the_pixels_that_the_policy_sees(tiny_policy: OftPolicy) -> None:
    image = np.random.default_rng(0).integers(0, 256, (28, 28, 3), dtype=np.uint8)
    ours = normalize_pixels(torch.from_numpy(image)[None, None])[0].numpy()
    theirs = pixel_values(image, tiny_policy.processor.spec.image)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
