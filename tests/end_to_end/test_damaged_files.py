"""Damaged files of every kind that others hand over are read or refused: never a traceback.

Recordings of demonstrations are damaged in `tests/calibration/sources/test_damaged_sources.py`.
"""

import functools
import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loop_bundles import loop_bundle
from small_plans import sensitivities
from small_recordings import recorder, served
from small_sources import damaged
from tiny_bundles import mixed_plan
from tiny_policy import TINY_INSTRUCTIONS, write_tiny_checkpoint
from victims import ACTS, FAMILIES, Victim, read_whole_files_once

from jetson.recording.reader import Recording
from qvla_export.policies.families import load_policy, recognize
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.policies.prismatic.new_checkpoint import NetworkSize
from qvla_export.policies.prismatic.state_files import read_state_file, require_undamaged
from qvla_export.policies.prismatic.weights import open_body
from qvla_export.quantizer.plan import BitPlan
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.bundle import GOLDEN, MANIFEST, Bundle, manifest_digest
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.normalization import load_statistics
from qvla_export.shared.observation import Observation
from qvla_export.shared.processor import load_tokenizer

_SMALLEST = NetworkSize(
    image_size=28,
    patch_size=14,
    vision_dim=8,
    vision_depth=2,
    hidden_dim=8,
    mlp_dim=8,
    depth=1,
    heads=2,
    vocab_size=300,
)


def sharded(folder: Path) -> Path:
    """Let a checkpoint's index name its only file of weights."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "np") as file:
        names = dict.fromkeys(file.keys(), "model.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    return index


def checkpoint_json(folder: Path) -> Victim:
    names = ("config.json", "qvla_policy.json", "preprocessor_config.json")
    blank = {"image": np.zeros((28, 28, 3), np.uint8)}
    observation = Observation(blank, TINY_INSTRUCTIONS[0], np.zeros(4, np.float32))
    taken = itertools.count()

    def read() -> None:
        recognize(folder).check_files(folder, None)
        policy = load_policy(folder, resident=False)
        if next(taken) % ACTS == 0:
            policy = load_policy(folder)
            size = policy.processor.spec.state_dim
            images = dict.fromkeys(policy.processor.spec.cameras, blank["image"])
            state = np.zeros(size, np.float32)
            chunk = policy.infer(Observation(images, observation.instruction, state))
            assert np.isfinite(chunk.actions).all()

    return Victim((sharded(folder), *(folder / name for name in names)), read)


def weights(folder: Path) -> Victim:
    taken = itertools.count()

    def read() -> None:
        recognize(folder).check_files(folder, None)
        open_body(folder).require_finite()
        if next(taken) % ACTS == 0:
            recognize(folder).check(folder, None, None)

    return Victim((folder / "model.safetensors",), read)


def head(folder: Path) -> Victim:
    path = folder / "action_head--0_checkpoint.pt"

    def read() -> None:
        require_undamaged(path)
        read_state_file(path)

    return Victim((path,), read)


def head_without_checksums(folder: Path) -> Victim:
    """Bytes that a writer of malice has mended: only the restricted unpickler is left."""
    path = folder / "action_head--0_checkpoint.pt"
    return Victim((path,), lambda: read_state_file(path))


def statistics(folder: Path) -> Victim:
    path = folder / "dataset_statistics.json"
    return Victim((path,), lambda: load_statistics(path, None, "q99", 4, 4))


def tokenizer(folder: Path) -> Victim:
    path = folder / "tokenizer.json"
    return Victim((path,), lambda: load_tokenizer(path))


def manifest(folder: Path) -> Victim:
    def mended(data: bytes) -> bytes:
        try:
            value = json.loads(data)
            value["digest"] = manifest_digest({k: v for k, v in value.items() if k != "digest"})
        except (ValueError, TypeError):
            return data
        return json.dumps(value).encode()

    def read() -> None:
        bundle = Bundle.load(folder)
        bundle.golden()
        assert repr(bundle) and bundle.nbytes > 0

    return Victim((folder / MANIFEST,), read, mended)


def golden(folder: Path) -> Victim:
    """The safetensors of a bundle, read as the robot does after the digests."""
    bundle = Bundle.load(folder)
    return Victim((folder / GOLDEN,), bundle.golden)


def plan(path: Path) -> Victim:
    def read() -> None:
        loaded = BitPlan.load(path)
        assert repr(loaded) and loaded.histogram() and loaded.couplings is not None

    return Victim((path,), read)


def table(path: Path) -> Victim:
    return Victim((path,), lambda: repr(Sensitivities.load(path)))


def recording(path: Path) -> Victim:
    return Victim((path,), lambda: list(Recording(path).moments()))


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Victim]:
    return functools.cache(lambda kind: FAMILIES[kind](tmp_path_factory.mktemp(kind)))


@pytest.fixture
def victim(
    kind: str,
    families: Callable[[str], Victim],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> Victim:
    if kind in DESCRIPTIONS:
        read_whole_files_once(monkeypatch)
    if kind in FAMILIES:
        return families(kind)
    found: Victim = request.getfixturevalue("victims")[kind]
    return found


@pytest.fixture(scope="module")
def victims(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_policy: OftPolicy,
    tiny_observations: Callable[..., list[Observation]],
) -> dict[str, Victim]:
    root = tmp_path_factory.mktemp("damaged")
    folder = write_tiny_checkpoint(root / "checkpoint", size=_SMALLEST)
    bundle = loop_bundle(tiny_policy, tiny_observations(2), root / "bundle").path
    mixed_plan(tiny_policy).save(root / "plan.json")
    rng = np.random.default_rng(0)
    layers = {"a": rng.random((4, 8), np.float32), "b": rng.random((4, 5), np.float32)}
    sensitivities(layers).save(root / "sensitivities.safetensors")
    with recorder(root / "recording.mcap") as writing:
        for index in range(3):
            writing.on_request(served(index, 8))
    return {
        "weights": weights(folder),
        "checkpoint": checkpoint_json(folder),
        "head": head(folder),
        "head-without-checksums": head_without_checksums(folder),
        "statistics": statistics(folder),
        "tokenizer": tokenizer(folder),
        "manifest": manifest(bundle),
        "golden": golden(bundle),
        "plan": plan(root / "plan.json"),
        "table": table(root / "sensitivities.safetensors"),
        "recording": recording(root / "recording.mcap"),
    }


# Kinds of files that say how a policy is made, beside whole files of weights.
DESCRIPTIONS = ("checkpoint", *FAMILIES)
# Kind -> damaged files of it in the default suite: fewer where reading one takes long.
FEW = {
    "weights": 80,
    "checkpoint": 60,
    "head": 60,
    "head-without-checksums": 60,
    "statistics": 250,
    "tokenizer": 200,
    "manifest": 60,
    "golden": 200,
    "plan": 80,
    "table": 200,
    "recording": 80,
    "act": 40,
    "smolvla": 40,
    "univla": 30,
    "openvla": 30,
    "pi": 60,
    "pi05": 60,
    "lerobot-pi": 60,
    "adapter": 150,
}


@pytest.mark.parametrize(
    "count",
    [0, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])],
    ids=["few", "many"],
)
@pytest.mark.parametrize("kind", FEW)
def test_damage_is_read_or_refused(
    victim: Victim, kind: str, count: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    count = count or FEW[kind]
    whole = {path: path.read_bytes() for path in victim.files}
    rng = np.random.default_rng((len(kind), count))
    victim.read()
    refused = 0
    for number in range(count):
        path = victim.files[number % len(victim.files)]
        path.write_bytes(victim.mend(damaged(whole[path], rng)))
        try:
            victim.read()
        except QvlaError as error:
            assert str(error).strip()
            refused += 1
        except BaseException as error:
            kept = path.with_name(f"crash-{number}-{path.name}")
            kept.write_bytes(path.read_bytes())
            error.add_note(f"{kind}: damaged file number {number}, kept as {kept}")
            raise
        finally:
            path.write_bytes(whole[path])
    victim.read()
    print(f"{kind}: {count} damaged, {refused} refused")
    # What torch and safetensors take as it stands is little: flipped bits of weights.
    assert refused > count // 10


LONG_NAME = "x" * 300
ONE_STATE = {"observation.state": {"type": "STATE", "shape": [6]}}
NORMALIZER = ("steps", 3)
ONE_TOWER = {"mean": [0.5] * 3, "std": [0.5] * 3}


@pytest.mark.parametrize(
    ("kind", "file", "place", "value"),
    [
        ("act", "config.json", ("input_features",), ONE_STATE),
        ("act", "config.json", ("n_action_steps",), 4096),
        ("act", "policy_preprocessor.json", (*NORMALIZER, "config", "norm_map", "STATE"), "x"),
        ("act", "policy_preprocessor.json", (*NORMALIZER, "state_file"), LONG_NAME),
        ("smolvla", "vlm/config.json", ("vision_config", "layer_norm_eps"), -1),
        ("smolvla", "vlm/config.json", ("text_config", "rms_norm_eps"), 0),
        ("univla", "qvla_policy.json", ("latent_tokens",), 1 << 40),
        ("univla", "preprocessor_config.json", ("tvf_normalize_params",), [ONE_TOWER]),
        ("pi", "qvla_policy.json", ("min_period",), "x"),
        ("pi", "qvla_policy.json", ("optional_cameras",), 3),
        ("pi", "qvla_policy.json", ("optional_cameras",), [[]]),
        ("pi", "qvla_policy.json", ("vision_heads",), "x"),
        ("pi", "qvla_policy.json", ("prompt",), None),
        ("pi", "qvla_policy.json", ("prompt_state_width",), []),
        ("lerobot-pi", "config.json", ("image_resolution",), [28]),
        ("lerobot-pi", "config.json", ("image_resolution",), [28, 28, 28]),
        ("adapter", "adapter_config.json", ("base_model_name_or_path",), LONG_NAME),
        ("adapter", "adapter_config.json", ("use_rslora",), "no"),
    ],
)
def test_a_value_that_no_policy_has_is_refused(
    families: Callable[[str], Victim], kind: str, file: str, place: tuple[Any, ...], value: object
) -> None:
    victim = families(kind)
    path = next(path for path in victim.files if path.as_posix().endswith(f"/{file}"))
    whole = path.read_bytes()
    document = json.loads(whole)
    holder = functools.reduce(lambda node, step: node[step], place[:-1], document)
    assert place[-1] in holder
    holder[place[-1]] = value
    path.write_text(json.dumps(document))
    try:
        with pytest.raises(QvlaError):
            victim.read()
    finally:
        path.write_bytes(whole)


def test_statistics_of_openpi_may_lack_a_quantile_that_the_policy_does_not_use(
    families: Callable[[str], Victim],
) -> None:
    victim = families("pi")
    path = victim.files[-1]
    whole = path.read_bytes()
    document = json.loads(whole)
    del document["norm_stats"]["state"]["q99"]
    path.write_text(json.dumps(document))
    try:
        victim.read()
    finally:
        path.write_bytes(whole)
