"""What a comparison makes of its rows: intervals, bars, JSON, page; and contestants' names."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvla_export.comparison.bars import bars
from qvla_export.comparison.comparison import Comparison
from qvla_export.comparison.contestants import TABLES, parse_contestant, table_contestants
from qvla_export.comparison.markdown import to_markdown
from qvla_export.comparison.page import render
from qvla_export.comparison.paired import paired_difference, wilson_95
from qvla_export.comparison.rows import Cost, Outcome, Row, SeedRow
from qvla_export.quantizer.quantize import QuantizerSpec, WidthRule
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.errors import ArtifactError, QvlaError


def seed_row(
    rms: float = 0.01,
    solved: list[bool] | None = None,
    seed: int = 0,
    weight_bytes: int = 100,
    library: str | None = None,
) -> SeedRow:
    episodes = tuple(Outcome("task", i, done, 0.5) for i, done in enumerate(solved or []))
    cost = Cost(weight_bytes, 400, 4.0, 4.0, 4.0)
    return SeedRow(
        seed, "digest", "torch", cost, 8, rms, (rms,), (rms,), {"plan": 2.0}, {"plan": 1.0},
        library, episodes, (0.1, 0.2) if episodes else (),
    )  # fmt: skip


def comparison_of(**rows: SeedRow) -> Comparison:
    named = {name.replace("_", "-").replace("2-5", "2.5"): row for name, row in rows.items()}
    found = tuple(Row(name, (row,)) for name, row in named.items())
    told = {"target": "cpu", "seeds": [0], "count": 1, "held_out": 8}
    return Comparison("policy", "qvla compare", {"cores": "2"}, told, found)


def test_bars_are_held_against_float_and_the_best_baseline() -> None:
    half = [True, False] * 100
    fewer = [False] * 6 + half[6:]  # three of 200: 1.5 points
    found = comparison_of(
        float=seed_row(0.0, half),
        w8=seed_row(0.001, fewer),
        w4=seed_row(0.005, fewer, weight_bytes=90),
        w3=seed_row(0.01, half[:100]),
        w2=seed_row(0.01, weight_bytes=101),
        w4_rtn=seed_row(0.02),
        w4_gptq=seed_row(0.01, library="llmcompressor 0"),
        w2_rtn=seed_row(0.05),
    )
    told = {bar.requirement[:9]: bar for bar in bars(found)}
    assert (told["8 mean bi"].met, told["4 mean bi"].met) == (False, True)
    # Too few episodes say nothing, nor does a setting that is not there.
    assert (told["3 mean bi"].met, told["2.5 mean "].met) == (None, None)
    assert told["4 bits: a"].met is True  # 0.5 of GPTQ's, in fewer bytes
    assert told["3 bits: a"].met is None  # no baseline
    assert told["2 bits: a"].met is None  # ours has more bytes than the baseline
    better = found.with_row(Row("w4-gptq", (seed_row(0.006),)))
    assert {bar.requirement[:9]: bar.met for bar in bars(better)}["4 bits: a"] is False


def test_rows_pool_over_seeds() -> None:
    row = Row("w4", (seed_row(0.01, [True], 0), seed_row(0.03, [False, True], 1)))
    assert row.rms == pytest.approx(0.02)
    assert row.rms_spread == pytest.approx(0.02 / 2**0.5)
    assert row.success == pytest.approx(2 / 3)
    assert row.deviation == pytest.approx(0.5)
    assert row.total_seconds == 2
    with pytest.raises(QvlaError, match="each seed once"):
        Row("w4", (seed_row(), seed_row()))


def test_json_is_read_as_it_was_written(tmp_path: Path) -> None:
    found = comparison_of(float=seed_row(0.0, [True, False]), w4=seed_row(0.01, [True, True]))
    found = replace(found, controls={"blank-image": (Outcome("task", 0, False, None),)})
    found.save(tmp_path / "c.json")
    assert Comparison.load(tmp_path / "c.json") == found
    pooled = json.loads((tmp_path / "c.json").read_text())["rows"][1]["pooled"]
    assert pooled["against_float"]["value"] == 0.5


def test_episodes_of_one_scene_count_as_one_and_motion_is_shown(tmp_path: Path) -> None:
    def row(name: str, solved: list[bool], scenes: tuple[str, str]) -> Row:
        episodes = tuple(
            Outcome(task, number, done, None, scene, 100.0 + number, 2)
            for number, done in enumerate(solved)
            for task, scene in zip(("push", "pick"), scenes, strict=True)
        )
        return Row(name, (replace(seed_row(), episodes=episodes),))

    half, worse = [True, False] * 30, [True, False, False] * 20
    apart, together = (
        row("w4", worse, scenes).against(row("float", half, scenes))
        for scenes in (("one", "other"), ("table", "table"))
    )
    assert apart is not None and together is not None
    assert (apart.value, apart.design_effect) == (together.value, 1.0)
    assert together.design_effect == pytest.approx(2.0) and together.low < apart.low
    moved = row("w4", half, ("table", "table"))
    assert moved.motion == (129.5, 2.0) and Row("w4", (seed_row(0.1, [True]),)).motion is None
    found = comparison_of(float=seed_row(0.0, [True])).with_row(moved)
    found.save(tmp_path / "c.json")
    assert Comparison.load(tmp_path / "c.json").rows[1] == moved
    assert "130; 2.00" in to_markdown(found)


@pytest.mark.parametrize(
    "damage",
    [
        lambda v: v.update(format="another"),
        lambda v: v.pop("rows"),
        lambda v: v["rows"][0]["seeds"].clear(),
        lambda v: v["rows"][0].update(name="w4-nothing"),
        lambda v: v["rows"][0]["seeds"][0].update(rms="0.1"),
        lambda v: v["rows"][0]["seeds"][0].update(rms=float("nan")),
        lambda v: v["rows"][0]["seeds"][0].update(engine="<script>"),
        lambda v: v["rows"][0]["seeds"][0]["episodes"][0].update(solved="yes"),
        lambda v: v.update(rows={"a": 1}),
        lambda v: v.update(ranks={"bits": 4}),
        lambda v: v.update(modules=[1]),
    ],
)
def test_damaged_json_is_refused(damage: Callable[[Any], Any], tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    comparison_of(float=seed_row(0.0, [True])).save(path)
    value = json.loads(path.read_text())
    damage(value)
    path.write_text(json.dumps(value))
    with pytest.raises(ArtifactError, match=r"c\.json"):
        Comparison.load(path)


def test_what_others_wrote_is_text_on_the_page() -> None:
    hostile = "<script>alert(1)</script>|"
    found = comparison_of(w4_awq=seed_row(library=hostile, solved=[True]), float=seed_row())
    found = replace(
        found, command=hostile, controls={"blank-image": (Outcome("t", 0, True, None),)}
    )
    values = {"a.mlp.fc": np.ones((4, 3), np.float32)}
    rules = QuantizerSpec({bits: WidthRule(None, "max") for bits in (2, 4, 8)})
    measured = Sensitivities(
        values, (0, 2, 4, 8), {"a.mlp.fc": 2}, hostile, 1, 0, "policy", "set", rules
    )
    page = render(found, measured)
    assert "<script" not in page
    assert "float, blank-image" in page
    assert "&lt;script&gt;" in page
    assert "<h3>Fig. 3" in page
    rows = [line for line in to_markdown(found).splitlines() if line.startswith("| w4-awq")]
    assert rows
    assert all(len(re.split(r"(?<!\\)\|", row)) == 11 for row in rows)


def test_the_section_has_every_episode_and_every_table() -> None:
    found = comparison_of(
        float=seed_row(0.0, [True] * 4),
        w4=seed_row(0.001, [True, True, True, False], weight_bytes=2_500_000),
        w4_layer=seed_row(0.02, weight_bytes=2_400_000),
        w8=seed_row(0.0001),
    )
    lines = to_markdown(replace(found, controls={})).splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    (w4,) = [row for row in cells if row[0] == "**w4**"]
    assert w4[2:5] == ["2.50", "0.0010 ± 0", "75.0 % [30.1, 95.4], n 4"]
    assert w4[5].startswith("-25.0 [")
    assert not [row for row in cells if row[0] in ("**w8**", "w4-layer")]
    (per_layer,) = [row for row in cells if row[0].startswith("3, ") and "4 bits" in row[0]]
    assert per_layer[1] == "w4-layer 0.0200 (2.40) · w4 0.0010 (2.50; 75.0 %)"


def test_names_say_how_a_contestant_is_made() -> None:
    assert parse_contestant("w8a8@smoothed").smoothed
    assert parse_contestant("w4@16").observations == 16
    assert parse_contestant("w8a8-smoothquant").request == ("smoothquant", 8, 8)
    assert parse_contestant("w4a4").simulated
    assert not parse_contestant("w4a8").simulated
    assert [c.main for c in map(parse_contestant, ("w4", "w4-layer", "w4@16"))] == [1, 0, 0]
    both = parse_contestant("w4a8@smoothed+nearest")
    assert (both.smoothed, both.compensated) == (True, False)
    for wrong in (
        "",
        "w4@",
        "w4@8+16",
        "w4@smoothed+",
        "w4-rtn@nearest",
        "w4@0",
        "w4-awq@smoothed",
        "@smoothed",
        "w4@a",
    ):
        with pytest.raises(QvlaError):
            parse_contestant(wrong)
    assert {c.name for c in table_contestants()} == {n for t in TABLES for n in t.contestants}
    with pytest.raises(QvlaError, match="tables are"):
        table_contestants(("5",))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_paired_interval_holds_the_difference(pairs: list[tuple[bool, bool]]) -> None:
    ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
    found, turned = paired_difference(ours, theirs), paired_difference(theirs, ours)
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert (turned.value, turned.p_value) == (-found.value, found.p_value)
    assert turned.low == pytest.approx(-found.high)
    low, high = wilson_95(sum(ours), len(ours))
    assert 0 <= low <= sum(ours) / len(ours) <= high <= 1
    # Ten times as many such pairs say more.
    more = paired_difference(ours * 10, theirs * 10)
    assert more.high - more.low < found.high - found.low + 1e-12


def test_paired_interval_knows_that_episodes_are_the_same() -> None:
    # Policies that agree episode by episode, and two of the same success that never do.
    same = paired_difference([True] * 30 + [False] * 20, [True] * 30 + [False] * 20)
    assert same.value == 0
    assert same.high < 0.06
    apart = paired_difference([True] * 10 + [False] * 10, [False] * 10 + [True] * 10)
    assert apart.value == 0
    assert apart.high > 0.3
    with pytest.raises(QvlaError, match="as many"):
        paired_difference([True], [])


@given(st.integers(0, 40), st.integers(1, 40))
def test_p_value_is_of_the_exact_test(gained: int, lost: int) -> None:
    from scipy.stats import binomtest

    found = paired_difference([True] * gained + [False] * lost, [False] * gained + [True] * lost)
    assert found.p_value == pytest.approx(binomtest(gained, gained + lost).pvalue)


@given(st.integers(0, 50), st.integers(1, 50))
def test_wilson_interval_is_scipys(solved: int, more: int) -> None:
    from scipy.stats import binomtest

    expected = binomtest(solved, solved + more).proportion_ci(0.95, method="wilson")
    assert wilson_95(solved, solved + more) == pytest.approx((expected.low, expected.high))
