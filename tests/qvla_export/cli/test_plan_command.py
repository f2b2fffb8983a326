"""`qvla plan`: allocators, budgets, widths and regularizers as options and in settings' names."""

import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_plans import modules_table
from typer.testing import CliRunner

from engines.targets import CPU
from qvla_export.allocation.setting import Setting, parse_setting
from qvla_export.cli.app import app
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.quantizer.plan import BitPlan
from qvla_export.quantizer.quantize import spec_for
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.target import WIDTHS

Plan = Callable[[str], BitPlan]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run of five layers in three modules, with sensitivities and nothing else."""
    folder = RunFolder(tmp_path / "run")
    replace(modules_table(), quantizer=spec_for(CPU)).save(folder.sensitivities)
    return folder


@pytest.fixture
def plan(run: RunFolder) -> Plan:
    """Return `plan(arguments)`: the plan that the command writes; raises what it refuses with."""

    def make(arguments: str) -> BitPlan:
        words = shlex.split(arguments)
        found = CliRunner().invoke(app, ["plan", "--run", str(run.root), *words])
        if found.exception is not None:
            raise found.exception
        setting = parse_setting(words[words.index("--setting") + 1])
        return BitPlan.load(run.plan(setting))

    return make


def recorded(made: BitPlan) -> dict[str, Any]:
    assert made.allocation is not None
    return dict(made.allocation)


@pytest.mark.parametrize(
    ("name", "method", "widths"),
    [
        ("w4", "hull", WIDTHS),
        ("w4-alg1", "algorithm1", WIDTHS),
        ("w4-staged", "staged", WIDTHS),
        ("w4-gates", "gates", WIDTHS),
        ("w8-gates3", "gates", WIDTHS),
        ("w4-layer", "per-layer", WIDTHS),
        ("w4-module", "per-module", WIDTHS),
        ("w4-uniform", "uniform", WIDTHS),
        ("w8-set0.8", "hull", (0, 8)),
        ("w8-layer-set2.4.8.16", "per-layer", (2, 4, 8, 16)),
    ],
)
def test_a_settings_name_says_how_it_is_allocated(
    plan: Plan, name: str, method: str, widths: tuple[int, ...]
) -> None:
    made = plan(f"--setting {name}")
    assert recorded(made)["method"] == method
    assert set(np.concatenate(list(made.widths.values())).tolist()) <= set(widths)
    bits = parse_setting(name).bits
    assert made.mean_bits_per_channel <= bits
    # As many bytes as the uniform width, and no more.
    uniform = plan(f"--setting w{bits:g}-rtn")
    assert made.weight_bytes <= uniform.weight_bytes


def test_names_are_read_whole() -> None:
    assert parse_setting("w2.5a8-gates2-set0.4.8") == Setting(
        "w2.5a8-gates2-set0.4.8",
        "planned",
        2.5,
        8,
        method="gates",
        gates_row=2,
        widths=(0, 4, 8),
    )
    for wrong in ("w4-gates5", "w4-foo", "w4-refined", "w4-rtn-layer", "w4-set", "w4-"):
        with pytest.raises(QvlaError, match="planned one may go on with -alg1"):
            parse_setting(wrong)
    for wrong in ("w4-set0", "w4-set0.3"):
        with pytest.raises(QvlaError, match="-set takes widths among"):
            parse_setting(wrong)


def test_budgets_are_held_in_what_they_are_given_by(plan: Plan) -> None:
    uniform = plan("--setting w4-rtn")
    assert plan("--setting w4 --budget-by weight").mean_bits_per_weight <= 4
    assert plan("--setting w4 --budget-by channel --budget 5").mean_bits_per_channel > 4.9
    by_bytes = plan("--setting w4 --budget-by bytes")
    assert 0.97 * uniform.weight_bytes < by_bytes.weight_bytes <= uniform.weight_bytes
    assert plan("--setting w4 --budget-by bytes --budget 9000").weight_bytes <= 9000


def test_regularizers_are_named_parameters(plan: Plan) -> None:
    free = plan("--setting w2")
    capped = plan(
        "--setting w2 --regularizer max-share=0.1 --regularizer max-share-of-layer=0.2 "
        "--regularizer relative-threshold=0.5 --regularizer absolute-threshold=3"
    )
    assert recorded(capped)["pruning"] == {
        "max_share": 0.1,
        "max_share_of_layer": 0.2,
        "relative_threshold": 0.5,
        "absolute_threshold": 3.0,
    }
    assert 0 < capped.histogram()[0] < free.histogram()[0]
    assert capped.histogram()[0] <= 0.1 * sum(map(len, capped.widths.values()))


def test_gates_are_given_as_shares(plan: Plan) -> None:
    made = plan("--setting w8 --method gates --gates 8:0.75,0:0.25")
    channels = sum(map(len, made.widths.values()))
    assert made.histogram() == {0: channels // 4, 2: 0, 4: 0, 8: channels - channels // 4, 16: 0}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("w4 --regularizer share=1", "NAME=NUMBER with a name of"),
        ("w4 --regularizer max-share=many", "NAME=NUMBER.*'max-share=many'"),
        ("w4 --regularizer max-share=2", "share from 0 to 1, got 2"),
        ("w4 --widths 2,x", "--widths takes widths such as.*'2,x'"),
        ("w4 --widths 3", "allowed widths must be among"),
        ("w4 --gates 8", "--gates takes WIDTH:SHARE"),
        ("w4 --gates 8:1", "gates are for the method 'gates'"),
        ("w4 --budget 5", "--budget 5 needs --budget-by"),
        ("w4-layer --method hull", "allocated by per-layer, --method says hull"),
        ("w4-set0.8 --widths 8", r"allows \(0, 8\) bits, --widths says \[8\]"),
        ("w4-rtn --widths 4", "not allocated; leave out.*widths"),
        ("w4-rtn --budget-by bytes", "not allocated; leave out.*budget_by"),
        ("w1 --widths 2,4,8", "cannot be met.*raise the budget"),
    ],
)
def test_what_cannot_be_is_refused_with_the_remedy(plan: Plan, arguments: str, said: str) -> None:
    with pytest.raises(QvlaError, match=said):
        plan(f"--setting {arguments}")
