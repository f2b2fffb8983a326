"""Verification: figures of a drift, thresholds from compute type and plan, verdicts on engines."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from tiny_bundles import make_bundle, mixed_plan
from tiny_policy import TINY_CONFIG, write_tiny_checkpoint

from engines.base import EngineError, Feeds
from engines.drift import ActionDrift, action_drift
from engines.ort import OrtEngine
from engines.thresholds import ARITHMETIC, thresholds_for
from engines.verify import (
    VerificationError,
    engine_reference,
    feeds_digest,
    float_drift,
    judge,
    torch_reference,
    verify,
)
from qvla_export.policies.oft.policy import OftPolicy, load_oft_policy
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.errors import ArtifactMismatch
from qvla_export.shared.observation import Observation

Observations = Callable[..., list[Observation]]
Actions = NDArray[np.float32]
UNIT = np.array([1.0, 2.0, 0.5])
BINS = 255

actions = arrays(np.float32, (3, 2, 3), elements=st.floats(-1, 1, width=32))


class ReplayEngine:
    """Puts out given chunks, one a call."""

    def __init__(self, bundle: Bundle, chunks: Actions) -> None:
        self.inputs, self.outputs, self.runtime = bundle.inputs, bundle.outputs, "replay 1"
        self.part_ms: dict[str, float] = {}
        self.part_calls: dict[str, int] = {}
        self._chunks = iter(chunks)

    def infer(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        return {"actions": next(self._chunks)[None]}

    def close(self) -> None:
        pass

    def __enter__(self) -> "ReplayEngine":
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def bundles(
    tiny_policy: OftPolicy,
    tiny_observations: Observations,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Bundle, Bundle]:
    """A float and a quantized bundle with the same golden observations."""
    folder, seen = tmp_path_factory.mktemp("verify"), tiny_observations(4)
    return (
        make_bundle(tiny_policy, None, seen, folder / "float"),
        make_bundle(tiny_policy, mixed_plan(tiny_policy), seen, folder / "mixed"),
    )


# The figures.


@given(actions, actions)
def test_figures_are_ordered_symmetric_and_in_both_units(a: Actions, b: Actions) -> None:
    drift, back = action_drift(a, b, UNIT), action_drift(b, a, UNIT)
    assert (drift.mean_normalized <= drift.rms_normalized + 1e-12).all()
    assert (drift.rms_normalized <= drift.max_normalized + 1e-12).all()
    assert drift.rms <= drift.worst + 1e-12
    assert -1 - 1e-9 <= drift.cosine <= 1 + 1e-9
    np.testing.assert_allclose(drift.max_physical, drift.max_normalized * UNIT)
    np.testing.assert_allclose(drift.mean_physical, drift.mean_normalized * UNIT)
    np.testing.assert_array_equal(drift.rms_normalized, back.rms_normalized)
    assert drift.flipped is None


def test_the_median_is_of_observations() -> None:
    """One that lies far off moves the root mean square alone."""
    far = np.zeros((3, 2, 3), np.float32)
    far[1], far[2] = 0.25, 1.5
    drift = action_drift(np.zeros_like(far), far, UNIT)
    assert drift.median_rms == pytest.approx(0.25)
    assert drift.rms == pytest.approx(np.sqrt((0.25**2 + 1.5**2) / 3))
    assert drift.to_json()["median_rms"] == drift.median_rms


@given(actions, st.permutations(range(3)))
def test_equal_actions_do_not_drift_and_order_does_not_matter(a: Actions, order: Any) -> None:
    drift = action_drift(a, a.copy(), UNIT, BINS)
    assert drift.worst == drift.rms == 0
    assert drift.cosine == pytest.approx(1)
    assert drift.flipped is not None
    assert not drift.flipped.any()
    shuffled = action_drift(a[order], a[order] * 0, UNIT)
    np.testing.assert_allclose(
        shuffled.rms_normalized, action_drift(a, a * 0, UNIT).rms_normalized, rtol=1e-12
    )


@given(arrays(np.int64, (3, 2, 3), elements=st.integers(0, BINS - 1)), actions)
def test_flipped_counts_actions_in_another_bin(index: NDArray[np.int64], moved: Actions) -> None:
    jumps = np.where(moved > 0.5, 1, 0)
    centers = (np.linspace(-1, 1, BINS + 1)[:-1] + 1 / BINS).astype(np.float32)
    a, b = centers[index], centers[(index + jumps) % BINS]
    flipped = action_drift(a, b, UNIT, BINS).flipped
    assert flipped is not None
    np.testing.assert_allclose(flipped, jumps.mean(axis=(0, 1)))


def test_drift_refuses_other_shapes_and_nan() -> None:
    chunk = np.zeros((1, 2, 2), np.float32)
    for other in (chunk[:, :1], chunk[0], np.zeros((0, 2, 2), np.float32)):
        with pytest.raises(EngineError, match="must both be"):
            action_drift(chunk, other, np.ones(2))
    with pytest.raises(EngineError, match="finite"):
        action_drift(chunk, chunk * np.nan, np.ones(2))


# The thresholds.


def shifted(by: float, bins: int = 0, count: int = 1000) -> ActionDrift:
    """One dimension of three moved by the same amount everywhere."""
    a = np.full((count, 1, 3), 0.4, np.float32)
    b = a.copy()
    b[..., 1] += by
    return action_drift(a, b, UNIT, bins)


@pytest.mark.parametrize("compute", ["float32", "float16", "bfloat16"])
def test_a_float_engine_may_round_and_no_more(compute: Any) -> None:
    allowed = thresholds_for(compute, None, shifted(0), rounded=False)
    assert allowed.breaches(shifted(0.9 * ARITHMETIC[compute].rms)) == ()
    one = np.zeros((100, 1, 3), np.float32)
    other = one.copy()
    other[7, 0, 2] = 1.1 * ARITHMETIC[compute].max
    found = allowed.breaches(action_drift(one + 0.5, other + 0.5, UNIT))
    assert "dimension 2" in found[0]
    assert compute in allowed.reason


@given(st.floats(0, 1), st.floats(0, 1))
def test_a_larger_plan_error_never_allows_less(small: float, large: float) -> None:
    small, large = sorted((small, large))
    errors = shifted(small, count=2), shifted(large, count=2)
    for rounded in (False, True):
        less, more = (thresholds_for("float16", error, error, rounded) for error in errors)
        assert less.allowed.keys() == more.allowed.keys()
        assert all((less.allowed[name] <= more.allowed[name]).all() for name in less.allowed)
        assert (less.allowed["max_normalized"] >= ARITHMETIC["float16"].max).all()


def test_a_breach_says_dimension_amount_both_units_and_limit() -> None:
    allowed = thresholds_for("float32", shifted(1), shifted(0), rounded=False)
    (rms, largest) = allowed.breaches(shifted(0.5))
    assert rms == "the RMS difference in dimension 1 is 5.00e-01, allowed are 1.0e-02"
    assert largest == (
        "the largest |difference| in dimension 1 is 5.00e-01 (normalized; 1.00e+00 in the "
        "robot's units), allowed are 2.0e-02"
    )
    assert allowed.plus(allowed).breaches(shifted(0.015)) == ()


def flips(count: int, of: int, jump: float = 1.0) -> ActionDrift:
    a = np.full((of, 1, 3), 1 / 255, np.float32)
    b = a.copy()
    b[:count, 0, 0] += jump
    return action_drift(a, b, UNIT, BINS)


def test_near_ties_of_a_token_head_are_counted_not_measured() -> None:
    few, many = flips(0, 16), flips(0, 10_000)
    limits = [thresholds_for("float16", None, like, rounded=False) for like in (few, many)]
    assert limits[0].breaches(flips(1, 16, jump=2.0)) == ()
    assert "dimension 0 is 1.25e-01" in limits[0].breaches(flips(2, 16))[0]
    assert limits[1].breaches(flips(90, 10_000, jump=2 / BINS)) == ()
    assert "another bin" in limits[1].breaches(flips(150, 10_000, jump=2 / BINS))[0]
    # Few enough, but each far away.
    assert "the mean" in limits[1].breaches(flips(90, 10_000, jump=1.9))[0]


def test_a_token_policy_says_how_many_bins_its_actions_have(
    tiny_observations: Observations, tmp_path: Path
) -> None:
    config = dataclasses.replace(TINY_CONFIG, head="tokens", horizon=2)
    policy = load_oft_policy(write_tiny_checkpoint(tmp_path / "tokens", config=config))
    bins = policy.processor.spec.action_bins
    acted = policy.greedy_actions(policy.batch(tiny_observations(2))).numpy()
    index = (acted + 1) * bins / 2 - 0.5
    assert bins == BINS
    np.testing.assert_allclose(index, np.rint(index), atol=1e-4)


# Verdicts.


def test_a_float_engine_is_its_own_floor(bundles: tuple[Bundle, Bundle]) -> None:
    bundle, mixed = bundles
    with OrtEngine(bundle, 1) as engine:
        verdict = verify(bundle, engine)
        floor = float_drift(bundle, engine, torch_reference(mixed))
    assert verdict.drift.worst < 1e-4
    assert verdict.float_floor == verdict.action_error
    np.testing.assert_array_equal(floor.max_normalized, verdict.drift.max_normalized)
    with pytest.raises(VerificationError, match="is quantized"):
        float_drift(mixed, engine, torch_reference(mixed))


@pytest.mark.parametrize(("share", "passes"), [(0.002, True), (0.009, True), (0.03, False)])
def test_a_quantized_engine_may_add_a_share_of_the_plans_error(
    bundles: tuple[Bundle, Bundle], share: float, passes: bool
) -> None:
    bundle = bundles[1]
    golden = bundle.golden()
    drifted = golden.reference + share * (golden.full_precision - golden.reference)
    verdict = judge(bundle, ReplayEngine(bundle, drifted))
    assert verdict.passed == passes
    assert verdict.plan_error is not None
    assert verdict.action_error is not None
    np.testing.assert_allclose(
        verdict.action_error.rms, (1 - share) * verdict.plan_error.rms, rtol=1e-4
    )
    if not passes:
        with pytest.raises(VerificationError, match=r"dimension \d is .*allowed .*qvla verify"):
            verdict.require_passed()


def test_engines_of_two_plans_differ_by_no_more_than_the_plans(
    bundles: tuple[Bundle, Bundle], tiny_observations: Observations
) -> None:
    bundle, mixed = bundles
    feeds = [mixed.processor.feeds(seen) for seen in tiny_observations(5, seed=3)]
    with OrtEngine(bundle, 1) as plain, OrtEngine(mixed, 1) as engine:
        assert verify(mixed, engine, engine_reference(mixed, bundle, plain)).action_error
        held = verify(mixed, engine, engine_reference(mixed, bundle, plain, feeds, "held-out"))
        same = verify(mixed, engine, engine_reference(mixed, mixed, engine, feeds))
    assert held.action_error is None
    assert held.observations_digest == feeds_digest(feeds)
    assert (held.drift.observations, held.drift.worst > 0.05) == (5, True)
    assert same.drift.worst == 0
    reference = engine_reference(mixed, bundle, replay(bundle))
    assert not judge(mixed, ReplayEngine(mixed, -reference.actions - 1), reference).passed


def replay(bundle: Bundle) -> ReplayEngine:
    return ReplayEngine(bundle, bundle.golden().full_precision)


def test_bundles_of_two_policies_are_not_compared(bundles: tuple[Bundle, Bundle]) -> None:
    bundle = bundles[0]
    other = dataclasses.replace(bundle, manifest={**bundle.manifest, "policy_digest": "0" * 64})
    with pytest.raises(ArtifactMismatch, match="of one policy"):
        engine_reference(bundle, other, replay(bundle))


@given(st.lists(st.sampled_from(["a", "b"]), min_size=1, max_size=3, unique=True))
def test_the_observations_digest_covers_names_shapes_and_values(names: Sequence[str]) -> None:
    feeds = [{name: np.arange(4, dtype=np.float32) for name in names}]
    changed = [
        [{name + "x": value for name, value in feeds[0].items()}],
        [{name: value.reshape(2, 2) for name, value in feeds[0].items()}],
        [{name: value + 1 for name, value in feeds[0].items()}],
        [*feeds, *feeds],
    ]
    assert len({feeds_digest(f) for f in [feeds, *changed]}) == 5
    assert feeds_digest(feeds) == feeds_digest([dict(reversed(feeds[0].items()))])
