"""Truncation and padding stored in tokenizer.json cut or pad no prompt."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvla_export.policies.oft.policy import OftPolicy, load_oft_policy
from qvla_export.shared.errors import CheckpointError, InvalidObservation
from qvla_export.shared.processor import OPENVLA_PROMPT, load_tokenizer

TRUNCATION = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 64},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 4,
    "pad_type_id": 0,
    "pad_token": "<pad>",
}


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("leaked") / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    path = folder / "tokenizer.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "truncation": TRUNCATION, "padding": PADDING}))
    return folder


@pytest.mark.parametrize(
    "change",
    [
        # The library panics, which is no Exception.
        {"continuing_subword_prefix": "9" * 99},
        {"vocab": {"a": 0}, "merges": []},
        {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "none", "merges": None},
        {"vocab": {}},
    ],
)
def test_a_tokenizer_that_cannot_encode_is_refused(
    checkpoint: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    stored = json.loads((checkpoint / "tokenizer.json").read_text())
    stored["model"] = {k: v for k, v in {**stored["model"], **change}.items() if v is not None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    with pytest.raises(CheckpointError, match="is not a tokenizers file"):
        load_tokenizer(tmp_path / "tokenizer.json")


@given(st.lists(st.sampled_from(["push", "open", "the", "drawer", "slowly", "7", "é"]), min_size=1))
@settings(max_examples=50, deadline=None)
def test_every_instruction_keeps_its_tokens(
    checkpoint: Path, tiny_policy: OftPolicy, words: list[str]
) -> None:
    """llm-compressor #1418: a stored max_length cut every instruction to the template."""
    tokenizer = load_tokenizer(checkpoint / "tokenizer.json")
    plain = tiny_policy.processor.tokenizer
    assert plain is not None
    text = " ".join(words)
    assert tokenizer.encode(text).ids == plain.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_policy_sees_the_whole_instruction(checkpoint: Path, tiny_policy: OftPolicy) -> None:
    policy = load_oft_policy(checkpoint)
    for instruction in ("push", "open the small drawer slowly and close the window " * 3):
        np.testing.assert_array_equal(
            policy.processor.input_ids(instruction), tiny_policy.processor.input_ids(instruction)
        )


def test_an_instruction_in_the_template_is_put_there_once(tiny_policy: OftPolicy) -> None:
    """Clients of OpenVLA send the prompt, those of OpenVLA-OFT the instruction."""
    processor = tiny_policy.processor
    whole = OPENVLA_PROMPT.format(instruction="open the drawer")
    for text in (whole, f" {whole.upper()}\n", "open the drawer"):
        np.testing.assert_array_equal(
            processor.input_ids(text), processor.input_ids("open the drawer")
        )
    for part in ("What action should the robot take to open the drawer?", f"{whole} now"):
        with pytest.raises(InvalidObservation, match="part of the prompt's template"):
            processor.input_ids(part)
    for nothing in ("", " "):
        with pytest.raises(InvalidObservation, match="template and nothing else"):
            processor.input_ids(OPENVLA_PROMPT.format(instruction=nothing))


def test_what_bundles_store_says_neither(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = load_oft_policy(checkpoint).processor.tokenizer
    assert tokenizer is not None
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    assert stored["truncation"] is None and stored["padding"] is None


@pytest.mark.parametrize("words", ["open the drawer " * 200, "\N{GRINNING FACE}" * 2000])
def test_a_prompt_has_so_many_tokens(tiny_policy: OftPolicy, words: str) -> None:
    """Two thousand emoji took half a minute, and gigabytes that did not come back."""
    with pytest.raises(InvalidObservation, match=r"may have 256 tokens, \d+ came of"):
        tiny_policy.processor.input_ids(words)
    assert len(tiny_policy.processor.input_ids("open the drawer")) < 256
