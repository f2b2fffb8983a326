"""Tokens that are drawn: by upstream's law, alike everywhere, and by the observation."""

from pathlib import Path

import numpy as np
import pytest
import torch
from openvla_cases import openvla_observations
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper
from univla_cases import CODEBOOK, write_tiny_univla

from qvla_export.policies.prismatic.sampling import Sampling
from qvla_export.policies.univla.policy import UniVlaPolicy, load_univla_policy
from qvla_export.shared.inputs.noise import NoiseSpec, noise_from_json

DRAWS = 20_000


def gumbel_numbers(count: int, seed: int) -> torch.Tensor:
    [seen] = openvla_observations(1)
    return torch.from_numpy(NoiseSpec("noise", (count, CODEBOOK), "gumbel", seed=seed).draw(seen))


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(0.75, 0.9), (1.0, 1.0), (2.0, 0.5), (0.1, 0.9), (0.75, 0.01)]
)
def test_tokens_are_drawn_by_transformers_law(temperature: float, top_p: float) -> None:
    logits = 2 * torch.randn(1, CODEBOOK, generator=torch.manual_seed(5))
    warped = TemperatureLogitsWarper(temperature)(None, logits)
    law = TopPLogitsWarper(top_p)(None, warped).softmax(dim=-1)[0].double().numpy()
    numbers = gumbel_numbers(DRAWS, 11).reshape(DRAWS, 1, CODEBOOK)
    tokens = Sampling(temperature, top_p).choose(logits.expand(DRAWS, 1, -1), numbers)
    found = np.bincount(tokens.flatten().numpy(), minlength=CODEBOOK) / DRAWS
    assert not found[law == 0].any(), "what is cut is never drawn"
    spread = np.sqrt(law * (1 - law) / DRAWS)
    assert (np.abs(found - law) <= 4.5 * spread).all()


def test_gumbel_s_numbers_are_of_that_law() -> None:
    numbers = gumbel_numbers(2000, 2).double().numpy().ravel()
    # Mean: Euler's constant; variance: pi^2 / 6. Four standard errors of 64,000 numbers.
    assert abs(numbers.mean() - 0.577216) < 4 * 1.2825 / 253
    assert abs(numbers.var() - np.pi**2 / 6) < 0.1
    assert np.isfinite(numbers).all()
    spec = {"name": "noise", "shape": [4, 32], "distribution": "cauchy"}
    with pytest.raises(ValueError, match="no noise that can be drawn"):
        noise_from_json(spec)


@pytest.fixture(scope="module")
def drawing(tmp_path_factory: pytest.TempPathFactory) -> UniVlaPolicy:
    folder = tmp_path_factory.mktemp("drawing") / "checkpoint"
    return load_univla_policy(write_tiny_univla(folder, temperature=5.0, top_p=0.9))


def test_what_is_drawn_is_the_observation_s_and_the_seed_s(
    drawing: UniVlaPolicy, tmp_path: Path
) -> None:
    seen = openvla_observations(6, seed=1)
    batch = drawing.batch(seen)
    assert batch.tokens is not None and batch.noise is not None
    assert batch.noise.shape == (6, 4, CODEBOOK)
    again = drawing.batch(seen[::-1]).tokens
    assert again is not None and torch.equal(again.flip(0), batch.tokens)
    alone = [drawing.batch([item]).tokens for item in seen]
    assert torch.equal(torch.cat([tokens for tokens in alone if tokens is not None]), batch.tokens)
    greedy = load_univla_policy(write_tiny_univla(tmp_path / "greedy"))
    likeliest = greedy.batch(seen)
    assert likeliest.noise is None and likeliest.tokens is not None
    assert not torch.equal(likeliest.tokens, batch.tokens)
    other = load_univla_policy(
        write_tiny_univla(tmp_path / "other", temperature=5.0, top_p=0.9, noise_seed=1)
    )
    moved = other.batch(seen).tokens
    assert moved is not None and not torch.equal(moved, batch.tokens)
    assert len({drawing.digest, greedy.digest, other.digest}) == 3


def test_actions_are_of_the_tokens_that_were_drawn(drawing: UniVlaPolicy) -> None:
    batch = drawing.batch(openvla_observations(3))
    with torch.no_grad():
        forced = drawing.normalized_actions(batch)
    torch.testing.assert_close(forced, drawing.greedy_actions(batch), rtol=0, atol=1e-5)
