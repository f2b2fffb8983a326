"""Golden data of LeRobot's pi0 and pi0.5: from pictures, state and task to the robot's actions."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pi_cases import CASES, Case, folder_of

from qvla_export.policies.families import load_policy, recognize
from qvla_export.policies.pi.policy import PiPolicy
from qvla_export.shared.errors import ArtifactError, CheckpointError, QvlaError, StatisticsError
from qvla_export.shared.lerobot.lerobot_statistics import POSTPROCESSOR, PREPROCESSOR
from qvla_export.shared.observation import Observation

FEATURES, ACTIONS = 1e-4, 3e-4  # absolute, float32: the oracles' READMEs
LEROBOT = [path for path in CASES if Case(path).lerobot]
IDS = [f"{path.parent.name}-{path.stem}" for path in LEROBOT]
pytestmark = pytest.mark.skipif(not LEROBOT, reason="no golden case of LeRobot's layout here")


@pytest.fixture(scope="module", params=LEROBOT, ids=IDS)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.fixture(scope="module")
def policy(case: Case, tmp_path_factory: pytest.TempPathFactory) -> PiPolicy:
    loaded = load_policy(folder_of(case, tmp_path_factory.mktemp("lerobot") / "c"))
    assert isinstance(loaded, PiPolicy)
    return loaded


def observations(case: Case) -> list[Observation]:
    golden = case.golden
    cameras = [
        name
        for name in golden
        if name.startswith("image_") and golden[name].ndim == 4 and golden[name].dtype == np.uint8
    ]
    return [
        Observation(
            {name.removeprefix("image_"): golden[name][row] for name in cameras},
            str(golden["task"][row]),
            golden["state"][row],
        )
        for row in range(len(golden["task"]))
    ]


def test_inputs_are_upstreams(case: Case, policy: PiPolicy) -> None:
    golden, spec = case.golden, policy.processor.spec
    for row, seen in enumerate(observations(case)):
        feeds = policy.processor.feeds(seen)
        kept = golden["lang_masks"][row]
        assert feeds["input_ids"][0].tolist() == golden["lang_tokens"][row][kept].tolist()
        expected = golden["state_normalized"][row]
        np.testing.assert_allclose(policy.processor.state(seen), expected, rtol=0, atol=1e-6)
        if not spec.state_bins:
            np.testing.assert_array_equal(feeds["state"][0][len(expected) :], 0)
        # Upstream appends absent cameras; here they stay at their place.
        frames = feeds["pixel_values"].reshape(len(spec.cameras), 3, *spec.frame_size)
        present = [frames[i] for i in np.flatnonzero(feeds["image_mask"][0])]
        assert len(present) == int(golden["image_masks"][:, row].sum())
        for found, picture in zip(present, golden["images_prepared"][:, row], strict=False):
            np.testing.assert_allclose(found, picture, rtol=0, atol=1e-5)


@torch.no_grad()
def test_actions_are_upstreams(case: Case, policy: PiPolicy) -> None:
    batch = replace(policy.batch(observations(case)), noise=case.tensor("noise"))
    normalized = policy.greedy_actions(batch).numpy()
    expected = case.golden["actions_normalized"]
    np.testing.assert_allclose(normalized, expected, rtol=0, atol=ACTIONS)
    for row, actions in enumerate(normalized):
        found = policy.processor.chunk(actions).actions
        np.testing.assert_allclose(found, case.golden["actions"][row], rtol=0, atol=ACTIONS)


def rewritten(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("file", "old", "new", "error", "message"),
    [
        ("config.json", '"use_relative_actions": false', '"use_relative_actions": true',
         CheckpointError, "use_relative_actions is on"),
        ("config.json", '"use_peft": false', '"use_peft": true', CheckpointError, "adapter"),
        ("config.json", '"chunk_size"', '"chunk_sizes"', ArtifactError, "chunk_size"),
        (f"{PREPROCESSOR}.json", "to_batch_processor", "blur_processor",
         StatisticsError, "blur_processor"),
        (f"{PREPROCESSOR}.json", '"padding_side": "right"', '"padding_side": "left"',
         ArtifactError, "padding_side"),
        (f"{POSTPROCESSOR}.json", '"enabled": false', '"enabled": true', ArtifactError,
         "relative actions"),
        (f"{POSTPROCESSOR}.json", "policy_postprocessor_step_0", "elsewhere", CheckpointError,
         "no step of the processor files names"),
    ],
)  # fmt: skip
def test_what_is_not_computed_here_is_refused(
    file: str, old: str, new: str, error: type[QvlaError], message: str, tmp_path: Path
) -> None:
    folder = folder_of(Case(LEROBOT[-1]), tmp_path / "c")
    rewritten(folder / file, old, new)
    with pytest.raises(error, match=message):
        load_policy(folder)


def test_weights_of_the_other_policy_are_refused(tmp_path: Path) -> None:
    folder = folder_of(Case(LEROBOT[-1]), tmp_path / "c")
    kind = json.loads((folder / "config.json").read_text())["type"]
    other = "pi0" if kind == "pi05" else "pi05"
    rewritten(folder / "config.json", f'"type": "{kind}"', f'"type": "{other}"')
    assert recognize(folder).name == "pi"
    with pytest.raises(CheckpointError, match="files of one checkpoint"):
        load_policy(folder)


@pytest.mark.parametrize("field", ["adapt_to_pi", "relative_actions"])
def test_joints_are_converted_for_openpi_s_layout_alone(field: str, tmp_path: Path) -> None:
    folder = folder_of(Case(LEROBOT[-1]), tmp_path / "c")
    values = {"adapt_to_pi": True, "relative_actions": [0]}
    stated = json.loads((folder / "qvla_policy.json").read_text()) | {field: values[field]}
    (folder / "qvla_policy.json").write_text(json.dumps(stated))
    with pytest.raises(CheckpointError, match=f"says {field}, which is computed here for"):
        load_policy(folder)


def test_a_state_that_was_filled_up_in_the_prompt(tmp_path: Path) -> None:
    """As lerobot 0.4 trained pi0.5: zeros are bin 128."""
    case = next((Case(path) for path in LEROBOT if "pi05" in str(path)), None)
    if case is None:
        pytest.skip("no golden case of pi0.5 in LeRobot's layout here")
    folder = folder_of(case, tmp_path / "c")
    policy = load_policy(folder)
    seen = observations(case)[0]
    plain = policy.processor.prompt_ids(seen)
    width = case.golden["state"].shape[1] + 2
    stated = json.loads((folder / "qvla_policy.json").read_text()) | {"prompt_state_width": width}
    (folder / "qvla_policy.json").write_text(json.dumps(stated))
    filled = load_policy(folder)
    assert filled.digest != policy.digest
    tokenizer = policy.processor.tokenizer
    assert tokenizer is not None
    longer = str(case.golden["prompt"][0]).replace(";\nAction", " 128 128;\nAction")
    assert filled.processor.prompt_ids(seen).tolist() == tokenizer.encode(longer).ids
    assert len(filled.processor.prompt_ids(seen)) > len(plain)
