"""Golden data of upstream UniVLA: hidden states, latent tokens, chunks, a run of the decoder."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import oracle_root
from places import DATA
from univla_cases import CASE_IDS, CASES, EPISODES, Case, load_decoder

from jetson.control.chunks import ChunkBuffer, TimedChunk
from jetson.control.settings import LoopSettings
from qvla_export.shared.normalization import Bounds
from qvla_export.shared.observation import Observation

TOLERANCE = 1e-4  # absolute, float32: the oracle's README


@pytest.fixture(scope="module", params=CASES, ids=CASE_IDS)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_cases_are_found() -> None:
    """The committed subset has a run of the decoder; whole networks lie where oracles do."""
    assert EPISODES
    assert CASES or oracle_root().resolve() == DATA / "oracles"


def close(got: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=TOLERANCE)


def test_tokens_and_states_are_upstreams(case: Case) -> None:
    policy, arch = case.policy, case.policy.module.arch
    found = policy.decoded(case.batch())
    ids = (found.tokens + arch.first_latent_token).tolist()
    assert ids == case.golden["generated_latent_ids"].tolist()
    close(found.hidden, case.golden["last_hidden_states"])
    close(found.hidden[:, -arch.latent_tokens :], case.golden["latent_action"])
    close(found.hidden[:, : arch.patches], case.golden["visual_embed"])
    with torch.no_grad():
        logits = policy.module.language_model.lm_head(found.hidden[0, -arch.latent_tokens :])
    close(logits, case.golden["logits_latent_tokens_32001_32032"])


@torch.no_grad()
def test_chunks_are_upstreams(case: Case) -> None:
    batch = case.policy.with_tokens(case.batch())
    close(case.policy.greedy_actions(batch), case.golden["decoder_chunk"])
    # One pass over the chosen tokens is what is differentiated.
    close(case.policy.normalized_actions(batch), case.golden["decoder_chunk"])
    # Other tokens give another chunk.
    assert batch.tokens is not None
    other = replace(batch, tokens=(batch.tokens + 1) % case.policy.config.codebook)
    difference = case.policy.normalized_actions(other) - case.policy.normalized_actions(batch)
    assert difference.abs().max() > 100 * TOLERANCE


@torch.no_grad()
def test_prompts_of_other_lengths_do_not_disturb_each_other() -> None:
    """Cases in one batch give the chunks that each gives alone."""
    if not CASES:
        pytest.skip("no whole network is there")
    cases = [Case(path) for path in CASES if path.parent == CASES[0].parent]
    assert len(cases) > 1
    policy, batches = cases[0].policy, [case.batch() for case in cases]
    lengths = torch.tensor([batch.input_ids.shape[1] for batch in batches])
    assert len(set(lengths.tolist())) > 1
    rows = [batch.input_ids[0] for batch in batches]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=1)
    pixels = torch.cat([batch.pixel_values for batch in batches])
    batch = policy.with_tokens(replace(batches[0], pixel_values=pixels, input_ids=ids))
    together = policy.with_tokens(replace(batch, prompt_lengths=lengths))
    chunks = np.concatenate([case.golden["decoder_chunk"] for case in cases])
    close(policy.greedy_actions(together), chunks)
    close(policy.normalized_actions(together), chunks)


@torch.no_grad()
def test_the_decoder_alone_makes_upstreams_chunks() -> None:
    for path in EPISODES:
        decoder = load_decoder(path.parent)
        with np.load(path) as golden:
            latents, visual = (
                torch.from_numpy(golden[n]) for n in ("latent_action", "visual_embed")
            )
            for state, seen, chunk in zip(latents, visual, golden["chunk"], strict=True):
                close(decoder(state, decoder.visual_pool(seen))[0], chunk)


def test_chunks_ensembled_by_the_control_loop_are_upstreams_actions() -> None:
    """Its decay is upstream's, the other way round: here the newest chunk weighs most."""
    every_chunk = LoopSettings(10, 1e6, 1e6, mode="ensemble", ensemble_decay=-0.1)
    for path in EPISODES:
        buffer = ChunkBuffer(every_chunk)
        with np.load(path) as golden:
            low, high, mask = (golden[n] for n in ("action_low", "action_high", "mask"))
            for step, chunk in enumerate(golden["chunk"]):
                if step == golden["reset_before_step"]:
                    buffer.clear()
                actions = Bounds(low, high, mask).unnormalize(chunk).astype(np.float32)
                buffer.add(TimedChunk(step, actions, 0.0, step))
                planned = buffer.plan(step, 0.0)
                assert planned is not None
                np.testing.assert_allclose(planned.action, golden["action"][step], atol=TOLERANCE)


def test_pixel_values_of_the_frame(case: Case) -> None:
    seen = Observation({"full_image": case.golden["image"]}, "do it")
    pixels = case.policy.processor.pixel_values(seen)
    np.testing.assert_allclose(pixels, case.golden["pixel_values"][0], rtol=0, atol=1e-5)
