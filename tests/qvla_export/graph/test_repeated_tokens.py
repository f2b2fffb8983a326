"""UniVLA's history: a prompt that repeats the tokens of the step before, in torch and engines."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from graph_checks import require_clean
from hypothesis import given
from hypothesis import strategies as st
from openvla_cases import openvla_observations
from rtx_parser import builds
from univla_cases import CODEBOOK, write_tiny_univla

from engines.targets import CPU, find_target
from engines.verify import judge
from jetson.errors import RefusedSetting
from jetson.policy import EnginePolicy, UnsafeAction, open_bundle
from jetson.remembering_policy import RememberingPolicy
from jetson.server import open_server
from jetson.server_settings import ServerSettings
from qvla_export.graph.export import export_bundle
from qvla_export.policies.univla.policy import UniVlaPolicy, load_univla_policy
from qvla_export.shared.action import ActionChunk, ActionPolicy, following
from qvla_export.shared.bundle import Bundle, manifest_digest
from qvla_export.shared.errors import ArtifactError, CheckpointError, InvalidObservation
from qvla_export.shared.inputs.history import HistorySpec
from qvla_export.shared.observation import Observation

STEPS = 3


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> UniVlaPolicy:
    return load_univla_policy(write_tiny_univla(tmp_path_factory.mktemp("t") / "c", history=1))


@pytest.fixture(scope="module")
def bundle(policy: UniVlaPolicy, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    seen = openvla_observations(2)
    return export_bundle(policy, None, CPU, seen, tmp_path_factory.mktemp("b") / "bundle")


def episode(policy: ActionPolicy, seen: Sequence[Observation]) -> list[ActionChunk]:
    """Return the chunks of observations that follow each other."""
    chunks: list[ActionChunk] = []
    for observation in seen:
        chunks.append(policy.infer(following(observation, chunks[-1] if chunks else None)))
    return chunks


def one_task(count: int) -> list[Observation]:
    """Return observations of one episode: other pictures, the same instruction."""
    seen = openvla_observations(count, seed=5)
    return [replace(observation, instruction=seen[0].instruction) for observation in seen]


def test_the_prompt_is_upstreams(policy: UniVlaPolicy) -> None:
    """`In: ...? History action <ACT_..>..`, one token each, behind the question."""
    (seen,), arch = openvla_observations(1), policy.module.arch
    processor, tokenizer = policy.processor, policy.processor.require_tokenizer()
    question = f"In: What action should the robot take to {seen.instruction.lower()}?"
    for history, told in (
        ((), ""),
        ((3, 0, 31, 3), " History action <ACT_3><ACT_0><ACT_31><ACT_3>"),
    ):
        ids = processor.prompt_ids(replace(seen, history=history))
        expected = tokenizer.encode(f"{question}{told}\nOut:").ids
        assert ids.tolist() == [*expected, policy.config.suffix_token_id]
        latent = ids[(ids >= arch.first_latent_token) & (ids < arch.first_latent_token + CODEBOOK)]
        assert latent.tolist() == [arch.first_latent_token + token for token in history]


def test_an_engine_repeats_what_torch_does(policy: UniVlaPolicy, bundle: Bundle) -> None:
    require_clean(bundle)
    assert Bundle.load(bundle.path).processor.spec.history == HistorySpec(4, CODEBOOK)
    seen = one_task(STEPS)
    expected = episode(policy, seen)
    with open_bundle(bundle, threads=1) as robot:
        assert judge(bundle, robot.engine).passed
        chunks, alone = episode(robot, seen), [robot.infer(item) for item in seen]
        remembering = RememberingPolicy(robot)
        looped = [remembering.infer(item) for item in seen]
    for step, (chunk, torchs) in enumerate(zip(chunks, expected, strict=True)):
        assert chunk.history == torchs.history and len(chunk.history) == 4
        np.testing.assert_allclose(chunk.normalized, torchs.normalized, rtol=0, atol=1e-3)
        np.testing.assert_array_equal(looped[step].normalized, chunk.normalized)
        # The history is read: without it the network puts out something else.
        apart = np.abs(chunk.normalized - alone[step].normalized).max()
        assert (apart > 1e-3) == (step > 0)


def test_another_instruction_begins_without_history(bundle: Bundle) -> None:
    first, second = openvla_observations(2, seed=5)
    assert first.instruction != second.instruction
    with open_bundle(bundle, threads=1) as robot:
        remembering = RememberingPolicy(robot)
        remembering.infer(first)
        again = remembering.infer(second)
        np.testing.assert_array_equal(again.normalized, robot.infer(second).normalized)


@pytest.mark.slow
def test_tensorrt_targets_take_every_part(policy: UniVlaPolicy, tmp_path: Path) -> None:
    target = find_target("rtx4070")
    seen = openvla_observations(2)
    bundle = export_bundle(policy, None, target, seen, tmp_path / "bundle")
    for checked in ("rtx4070", "orin-jp7", "orin-jp6"):
        require_clean(bundle, find_target(checked))
    _, decoder, visual, action = bundle.parts
    caches = {spec.name: 27 for spec in decoder.inputs if "room" in spec.shape}
    assert builds(bundle.model_path(decoder), [{**caches, "hidden": rows} for rows in (24, 1)])
    assert builds(bundle.model_path(visual), [{"states": 24}])
    assert builds(bundle.model_path(action), [{}])


@given(
    st.lists(st.integers(-2, CODEBOOK + 1), max_size=6)
    .map(tuple)
    .filter(
        lambda tokens: (
            tokens and not (len(tokens) == 4 and all(0 <= token < CODEBOOK for token in tokens))
        )
    )
)
def test_what_no_step_chose_is_refused(tokens: tuple[int, ...]) -> None:
    with pytest.raises(InvalidObservation, match="history is empty or 4 numbers from 0 to 31"):
        HistorySpec(4, CODEBOOK).told("In: {instruction}?\nOut:", tokens)


def test_a_policy_without_history_refuses_one(tmp_path: Path) -> None:
    policy = load_univla_policy(write_tiny_univla(tmp_path / "c"))
    (seen,) = openvla_observations(1)
    assert policy.infer(seen).history == ()
    with pytest.raises(InvalidObservation, match="repeats nothing of the step before"):
        policy.infer(replace(seen, history=(1, 2, 3, 4)))


@pytest.mark.parametrize("history", [[1, 2], (1.0,), (True,), "12"])
def test_a_history_that_is_no_tuple_of_numbers_is_refused(history: object) -> None:
    (seen,) = openvla_observations(1)
    with pytest.raises(InvalidObservation, match="history must be a tuple of whole numbers"):
        replace(seen, history=history)  # type: ignore[arg-type]  # that is the case


def test_a_tokenizer_must_know_the_tokens(tmp_path: Path) -> None:
    folder = write_tiny_univla(tmp_path / "c", history=1)
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<ACT_7>", "<ACT_X>"))
    with pytest.raises(CheckpointError, match=r"<ACT_7> must be token \d+ .* it is None; add"):
        load_univla_policy(folder)


def test_a_server_refuses_it_with_the_reason(bundle: Bundle) -> None:
    """Requests do not say which step they follow."""
    with (
        open_bundle(bundle, threads=1) as robot,
        pytest.raises(RefusedSetting, match="repeats the tokens of the step before"),
        open_server(robot, ServerSettings(port=0)),
    ):
        pass


def test_a_manifest_must_name_what_is_repeated(bundle: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle.path, tmp_path / "bundle"))
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["digest"]
    outputs = [spec for spec in manifest["outputs"] if spec["name"] == "actions"]
    silent = {**manifest, "outputs": outputs}
    spec = {**manifest["processor"]["spec"], "history": {"tokens": 0, "choices": 32}}
    empty = {**manifest, "processor": {**manifest["processor"], "spec": spec}}
    for changed, says in (
        (silent, "no graph puts out 'tokens'"),
        (empty, "no history that a prompt can repeat"),
    ):
        whole = {**changed, "digest": manifest_digest(changed)}
        (folder / "manifest.json").write_text(json.dumps(whole))
        with pytest.raises(ArtifactError, match=says):
            Bundle.load(folder)


def test_tokens_that_are_no_numbers_are_not_handed_on(bundle: Bundle) -> None:
    class Broken:
        part_ms: ClassVar[dict[str, float]] = {}

        def infer(self, feeds: object) -> dict[str, np.ndarray]:
            return {"actions": np.zeros((1, 12, 7)), "tokens": np.full((1, 4), np.nan)}

    with pytest.raises(UnsafeAction, match="NaN or infinity"):
        EnginePolicy(bundle, Broken()).infer(one_task(1)[0])  # type: ignore[arg-type]  # a double
