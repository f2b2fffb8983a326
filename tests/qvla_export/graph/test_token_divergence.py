"""Eq. 2: the divergence of the distributions over an action's tokens."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from family_cases import FAMILY_CASES
from openvla_cases import openvla_observations, write_tiny_openvla
from scipy.stats import entropy

from engines.targets import CPU
from qvla_export.graph.golden import TokenDivergence, token_divergence
from qvla_export.pipeline.deployment.rows import DeployedSetting
from qvla_export.pipeline.texts.stage_texts import setting_cells
from qvla_export.policies.base import Policy
from qvla_export.policies.families import load_policy
from qvla_export.policies.layers import fake_quantized, layer_shapes
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.quantizer.uniform_plan import uniform_plan
from qvla_export.shared.observation import Observation

Make = Callable[..., list[Observation]]


@contextmanager
def sharpened(policy: Policy) -> Iterator[None]:
    """Run the block with all logits doubled."""
    weight = policy.module.get_parameter("language_model.lm_head.weight")
    with torch.no_grad():
        weight.mul_(2)
        yield
        weight.div_(2)


@pytest.mark.parametrize(("family", "tokens"), [("openvla", 7), ("univla", 4), ("tokens", 16)])
def test_divergence_is_scipys(family: str, tokens: int, tmp_path: Path) -> None:
    case = FAMILY_CASES[family]
    policy = load_policy(case.write(tmp_path / "checkpoint"))
    seen = case.observations(3)
    expected, batches = 0.0, [policy.batch([item]) for item in seen]
    with torch.no_grad():
        old = torch.cat([policy.normalized_actions(batch) for batch in batches])
        with sharpened(policy):
            new = torch.cat([policy.normalized_actions(batch) for batch in batches])
    for batch in batches:
        with torch.no_grad():
            logits = policy.token_logits(batch)
        assert logits is not None and logits.shape[:2] == (1, tokens)
        p, q = (values[0].double().softmax(dim=-1).numpy() for values in (logits, 2 * logits))
        expected += entropy(p, q, axis=-1).sum() / len(seen)
    got = token_divergence(policy, seen, partial(sharpened, policy))
    assert expected > 1e-3
    assert got is not None
    assert got.kl == pytest.approx(expected, rel=1e-4)
    apart = float((old - new).double().square().mean() ** 0.5)
    assert got.expected_rms == pytest.approx(apart, rel=1e-6)
    assert got.expected_rms > 1e-6
    assert token_divergence(policy, seen, nullcontext) == TokenDivergence(0, 0)


def test_fewer_bits_diverge_more(tmp_path: Path) -> None:
    policy = load_policy(write_tiny_openvla(tmp_path / "checkpoint"))
    shapes, seen = layer_shapes(policy.layers()), openvla_observations(4)
    found = []
    for bits in (8, 4, 2):
        plan = uniform_plan(shapes, bits, CPU, policy.digest)
        found.append(token_divergence(policy, seen, partial(fake_quantized, policy, plan)))
    eight, four, two = (figures for figures in found if figures is not None)
    assert 0 < eight.kl < four.kl < two.kl
    assert 0 < eight.expected_rms < four.expected_rms < two.expected_rms


def test_actions_that_are_no_tokens_have_none(
    tiny_policy: OftPolicy, tiny_observations: Make
) -> None:
    assert token_divergence(tiny_policy, tiny_observations(1), nullcontext) is None


def test_the_table_has_a_column_only_where_actions_are_tokens() -> None:
    row = DeployedSetting(
        *("w4", Path("bundle"), 10**6, 0.25, 0.01, 0.0123, None, None), 5.0, "max", 6.0
    )
    columns, ((*cells,),) = setting_cells([row])
    assert dict(zip(columns, cells, strict=True))["token KL"] == "0.0123"
    columns, rows = setting_cells([replace(row, token_kl=None)])
    assert "token KL" not in columns and len(rows[0]) == len(columns)
    columns, rows = setting_cells([replace(row, token_kl=None), row])
    assert [cells[columns.index("token KL")] for cells in rows] == ["", "0.0123"]
