"""Golden data of upstream OpenVLA: every intermediate result, the tokens and the actions."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from openvla_cases import CASE_IDS, CASES, FOLDER, Case, copied

from qvla_export.policies.cached_decoder import LayerCache
from qvla_export.policies.openvla.policy import OpenVlaPolicy
from qvla_export.policies.prismatic.loading import token_centers
from qvla_export.shared.processor import with_suffix

FEATURES, LOGITS, ACTIONS = 1e-4, 3e-4, 1e-6  # absolute, float32: the oracle's README
_VOCABULARY = 32000  # of Llama 2, upstream's constant; no file states it


@pytest.fixture(scope="module", params=CASES, ids=CASE_IDS)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def cached_logits(policy: OpenVlaPolicy, case: Case) -> torch.Tensor:
    """Return every token's logits by a pass over the prompt and one for each token after it."""
    module, batch = policy.module, case.batch()
    decoder, depth = module.language_model, len(module.language_model.model.layers)
    hidden, length = module.embed(module.patches(batch.pixel_values), batch.input_ids)
    tokens = len(case.golden["generated_token_ids"])
    longest = hidden.shape[1] + tokens - 1
    caches: Sequence[LayerCache] = [decoder.empty_cache(hidden, longest)] * depth
    found = []
    for _ in range(tokens):
        hidden, caches = decoder.blocks(hidden, length, caches, 0, depth)
        found.append(decoder.logits(hidden[:, -1:]))
        hidden, length = module.embed_tokens(found[-1].argmax(dim=-1)), length + 1
    return torch.cat(found, dim=1)


def test_cases_are_found() -> None:
    assert len(CASES) >= 2


@torch.no_grad()
def test_every_intermediate_result(case: Case) -> None:
    module, batch = case.policy.module, case.policy.with_tokens(case.batch())
    features = module.vision_backbone(batch.pixel_values)
    patches = module.projector(features)
    embeddings, length = module.embed(patches, batch.input_ids)
    assert length.tolist() == [embeddings.shape[1]]
    assert batch.tokens is not None
    follow = module.embed_tokens(batch.tokens[:, :-1])
    tokens = len(case.golden["generated_token_ids"])
    both = torch.cat([embeddings, follow], dim=1)
    hidden = module.language_model(both, length + tokens - 1)
    for got, name in (
        (features, "vision_patch_features"),
        (patches, "projected_features"),
        (embeddings, "multimodal_embeddings"),
        (hidden[0, -tokens:], "last_hidden_states_at_action_positions"),
    ):
        np.testing.assert_allclose(
            got.numpy(), case.golden[name], rtol=0, atol=FEATURES, err_msg=name
        )
    first = module.arch.first_action_token
    got = case.policy.token_logits(batch)[0].numpy()
    expected = case.golden["logits_at_action_positions"][:, first : first + got.shape[-1]]
    np.testing.assert_allclose(got, expected, rtol=0, atol=LOGITS)


def test_tokens_are_upstreams(case: Case) -> None:
    first = case.policy.module.arch.first_action_token
    tokens = case.policy.with_tokens(case.batch()).tokens
    assert tokens is not None
    assert (tokens[0] + first).tolist() == case.golden["generated_token_ids"].tolist()


def test_a_prompt_with_and_without_the_last_token_is_one(case: Case) -> None:
    suffix = case.policy.config.suffix_token_id
    ids = with_suffix(case.golden["input_ids"][0], suffix)
    assert ids.tolist() == case.golden["input_ids_with_29871"][0].tolist()
    assert with_suffix(ids, suffix).tolist() == ids.tolist()
    assert len(ids) == case.golden["attention_mask_full"].shape[1]


@torch.no_grad()
def test_what_is_cached_is_what_one_pass_computes(case: Case) -> None:
    batch = case.policy.with_tokens(case.batch())
    one_pass = case.policy.token_logits(batch)
    torch.testing.assert_close(cached_logits(case.policy, case), one_pass, rtol=0, atol=FEATURES)


@pytest.mark.parametrize(
    ("key", "name", "without"),
    [
        (None, "actions_dataset_statistics", ""),
        ("bridge_orig", "actions_bridge_orig", "dataset_statistics.json"),
        ("tiny_nomask", "actions_tiny_nomask", "dataset_statistics.json"),
    ],
)
def test_actions_by_either_files_statistics(
    case: Case, key: str | None, name: str, without: str, tmp_path: Path
) -> None:
    folder = copied(case.checkpoint, tmp_path / "checkpoint", without)
    policy = case.load(folder, key)
    chunk = policy.processor.chunk(policy.greedy_actions(case.batch())[0].numpy())
    for got, expected in (
        (chunk.normalized, case.golden["normalized_actions"]),
        (chunk.actions, case.golden[name]),
    ):
        np.testing.assert_allclose(got[0], expected, rtol=0, atol=ACTIONS)


def test_bins_are_upstreams() -> None:
    with np.load(FOLDER / "openvla" / "decode_tokens.npz") as golden:
        bins, expected = len(golden["bin_centers"]) + 1, golden["normalized_actions"]
        # The vocabulary that upstream's tokens end: they fill it up where a model's is longer.
        index = golden["token_ids"] - (_VOCABULARY - bins)
    inside = (index >= 0) & (index < bins)
    assert inside.sum() > 10
    got = token_centers(bins).numpy()[index[inside]]
    np.testing.assert_allclose(got, expected[inside], rtol=0, atol=ACTIONS)


@torch.no_grad()
def test_tokens_stand_for_upstreams_actions() -> None:
    with np.load(FOLDER / "preprocess" / "action_tokenizer.npz") as archive:
        golden = dict(archive)
    centers = token_centers(len(golden["bins"])).numpy()
    # The id before the first of the action tokens, which the vocabulary ends with.
    tokens = golden["token_ids"] - int(golden["action_token_begin_idx"]) - 1
    np.testing.assert_allclose(centers[tokens], golden["decoded"], rtol=0, atol=ACTIONS)


def test_prompts_of_other_lengths_do_not_disturb_each_other() -> None:
    """Two cases in one batch choose the tokens that each chooses alone."""
    cases = [Case(path) for path in CASES if path.parent == CASES[0].parent]
    policy = cases[0].policy
    rows = [case.batch().input_ids[0] for case in cases]
    lengths = torch.tensor([len(row) for row in rows])
    assert len(set(lengths.tolist())) > 1
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)
    pixels = torch.cat([case.batch().pixel_values for case in cases])
    batch = replace(cases[0].batch(), pixel_values=pixels, input_ids=ids, prompt_lengths=lengths)
    together = policy.with_tokens(batch)
    assert together.tokens is not None
    alone = [policy.with_tokens(case.batch()) for case in cases]
    for row, each in zip(together.tokens, alone, strict=True):
        assert each.tokens is not None and row.tolist() == each.tokens[0].tolist()
    apart = torch.cat([policy.normalized_actions(each) for each in alone])
    torch.testing.assert_close(policy.normalized_actions(together), apart, rtol=0, atol=1e-5)
