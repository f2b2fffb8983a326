"""Programs are judged when a manifest is read; bundles without one run straight."""

import dataclasses
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loop_bundles import LOOP, ROWS, loop_bundle, loop_parts

from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.shared.bundle import Bundle, manifest_digest
from qvla_export.shared.observation import Observation
from qvla_export.shared.part import Part, TensorSpec
from qvla_export.shared.program import (
    PartRuns,
    Program,
    ProgramError,
    program_from_json,
    program_to_json,
    run_program,
)
from qvla_export.shared.program_check import require_runnable

START, COUNT = LOOP.runs


def judge(program: Program, parts: tuple[Part, ...] | None = None) -> None:
    parts = parts or loop_parts()
    require_runnable(program, parts, parts[0].inputs, parts[1].outputs[1:])


def changed(**fields: Any) -> Program:
    return Program((START, dataclasses.replace(COUNT, **fields)))


def test_a_whole_program_passes() -> None:
    judge(LOOP)
    assert LOOP.calls == {"start": 1, "step": ROWS}


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (Program((COUNT, START)), "reads 'begin' before anything provides it"),
        (Program((START,)), "must run every part"),
        (Program((START, COUNT, PartRuns("more", ("other",)))), "must run every part"),
        (Program((START, dataclasses.replace(COUNT, name="start"))), "there twice: \\['start'\\]"),
        (changed(times=0), "1 to 1000 times, got 0"),
        (changed(times=10**9), "1 to 1000 times"),
        (changed(times=1), "runs once and carries"),
        (changed(start={"x": "begin"}), "reads 'total' before anything provides it"),
        (changed(start={"y": "begin"}), "starts \\['y'\\], no inputs"),
        (changed(start={"x": "nothing", "total": "empty"}), "reads 'nothing' before"),
        (changed(carry={"nothing": "x"}), "carries \\['nothing'\\], no outputs"),
        (changed(carry={"next_x": "y"}), "carries into \\['y'\\], no inputs"),
        (changed(carry={"next_x": "x", "actions": "x"}), "there twice: \\['x'\\]"),
        (changed(carry={"next_x": "total", "actions": "x"}), "takes 'x' as float32 \\[1, 4\\]"),
        (changed(start={"x": "empty", "total": "empty"}), "takes 'x' as float32 \\[1, 4\\]"),
        (changed(parts=("step", "step")), "there twice"),
    ],
)
def test_what_cannot_run_is_refused(program: Program, says: str) -> None:
    with pytest.raises(ProgramError, match=says):
        judge(program)


def test_a_tensor_that_grows_is_refused() -> None:
    first, second = loop_parts()
    total = TensorSpec("total", "float32", (1, "rows", 4))
    grown = TensorSpec("actions", "float32", (1, "rows+1", 4))
    parts = (
        first,
        dataclasses.replace(
            second, inputs=(second.inputs[0], total), outputs=(second.outputs[0], grown)
        ),
    )
    with pytest.raises(ProgramError, match="must keep its shapes from the second repetition on"):
        require_runnable(LOOP, parts, first.inputs, (grown,))


def test_types_must_meet() -> None:
    first, second = loop_parts()
    whole = TensorSpec("x", "int64", (1, 4))
    parts = (first, dataclasses.replace(second, inputs=(whole, second.inputs[1])))
    with pytest.raises(ProgramError, match="takes 'x' as int64"):
        judge(LOOP, parts)


def test_a_part_may_be_called_with_other_sizes() -> None:
    """A decoder takes the whole prompt first and then one token at a time."""
    any_rows = ("any",)
    part = Part(
        "decoder",
        (TensorSpec("tokens", "float32", any_rows), TensorSpec("cache", "float32", ("room",))),
        (TensorSpec("token", "float32", (1,)), TensorSpec("filled", "float32", ("room",))),
    )
    embed = Part(
        "embed",
        (TensorSpec("prompt", "float32", ("n",)),),
        (TensorSpec("sequence", "float32", ("n+3",)), TensorSpec("empty", "float32", ("n+9",))),
    )
    moves = {"token": "tokens", "filled": "cache"}
    program = Program(
        (
            PartRuns("embed", ("embed",)),
            PartRuns("prefill", ("decoder",), start={"tokens": "sequence", "cache": "empty"}),
            PartRuns(
                "decode",
                ("decoder",),
                times=6,
                start={name: out for out, name in moves.items()},
                carry=moves,
            ),
        )
    )
    require_runnable(program, (embed, part), embed.inputs, part.outputs[:1])
    assert program.calls == {"embed": 1, "decoder": 7}


@given(st.integers(1, 12), st.integers(-3, 3))
def test_carried_values_are_those_of_the_repetition_before(times: int, first: int) -> None:
    """Two values that change places: what is carried is taken at the end of each repetition."""
    run = PartRuns("swap", ("a", "b"), times, {}, {"out_a": "in_b", "out_b": "in_a"})

    def call(run: PartRuns, part: str, inputs: dict[str, int]) -> dict[str, int]:
        return {f"out_{part}": inputs[f"in_{part}"] + (part == "a")}

    reads = {"a": ["in_a"], "b": ["in_b"]}
    values = run_program(Program((run,)), reads, {"in_a": first, "in_b": 10}, call)
    a, b = first, 10
    for _ in range(times):
        out_a, out_b = a + 1, b
        a, b = out_b, out_a
    assert (values["out_a"], values["out_b"]) == (out_a, out_b)


def test_what_is_carried_is_let_go_once_it_is_read() -> None:
    """Caches of all blocks are most of what a decoder holds: never those of two passes at once."""

    class Cache:
        pass

    blocks = range(8)
    moves = {f"next_{i}": f"cache_{i}" for i in blocks}
    names = tuple(f"block_{i}" for i in blocks)
    start = dict.fromkeys(moves.values(), "empty")
    runs = (
        PartRuns("prefill", names, start=start),
        PartRuns("decode", names, 4, {name: out for out, name in moves.items()}, moves),
    )
    alive: weakref.WeakSet[Cache] = weakref.WeakSet()
    most = 0

    def call(run: PartRuns, part: str, inputs: dict[str, Cache]) -> dict[str, Cache]:
        nonlocal most
        made = Cache()
        alive.add(made)
        most = max(most, len(alive))
        return {part.replace("block", "next"): made}

    reads = {f"block_{i}": [f"cache_{i}"] for i in blocks}
    values = run_program(Program(runs), reads, {"empty": Cache()}, call)
    assert most <= len(blocks) + 2  # a block's own, and the one before's until the next begins
    assert set(values) == {"empty", *moves}


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        ["run"],
        [{"name": "a"}],
        [{"name": "", "parts": ["a"], "times": 1, "start": {}, "carry": {}}],
        [{"name": "a", "parts": "a", "times": 1, "start": {}, "carry": {}}],
        [{"name": "a", "parts": ["a"], "times": True, "start": {}, "carry": {}}],
        [{"name": "a", "parts": ["a"], "times": 1.5, "start": {}, "carry": {}}],
        [{"name": "a", "parts": ["a"], "times": 1, "start": {"x": 1}, "carry": {}}],
        [{"name": "a", "parts": ["a"], "times": 1, "start": {}, "carry": []}],
        [{"name": "a", "parts": ["a"], "times": 1, "start": {}, "carry": {}, "more": 1}],
    ],
)
def test_what_is_no_program_is_refused(value: Any) -> None:
    with pytest.raises(ProgramError):
        program_from_json(value)


def test_a_program_survives_json() -> None:
    assert program_from_json(json.loads(json.dumps(program_to_json(LOOP)))) == LOOP


class TestManifests:
    @pytest.fixture
    def folder(
        self,
        tiny_policy: OftPolicy,
        tiny_observations: Callable[..., list[Observation]],
        tmp_path: Path,
    ) -> Path:
        return loop_bundle(tiny_policy, tiny_observations(1), tmp_path / "bundle").path

    def rewrite(self, folder: Path, **changes: Any) -> None:
        manifest = {**json.loads((folder / "manifest.json").read_text()), **changes}
        gone = {"digest"} | {"program" for value in [manifest["program"]] if value is None}
        manifest = {name: value for name, value in manifest.items() if name not in gone}
        manifest["digest"] = manifest_digest(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))

    def test_a_changed_program_is_refused_at_load(self, folder: Path) -> None:
        self.rewrite(folder, program=program_to_json(changed(times=5000)))
        with pytest.raises(ProgramError, match="5000"):
            Bundle.load(folder)

    def test_a_missing_program_is_refused(self, folder: Path) -> None:
        self.rewrite(folder, program=None)
        with pytest.raises(ProgramError, match="lacks its program"):
            Bundle.load(folder)

    def test_the_format_without_programs_obeys_none(self, folder: Path) -> None:
        """Were it run once, the step would read what nothing provides: refused, not acted on."""
        self.rewrite(folder, format="qvla-bundle-2", program=None)
        with pytest.raises(ProgramError, match="before anything provides it"):
            Bundle.load(folder)

    def test_the_old_format_with_a_program_is_refused(self, folder: Path) -> None:
        self.rewrite(folder, format="qvla-bundle-2")
        with pytest.raises(ProgramError, match="'qvla-bundle-2' has no program"):
            Bundle.load(folder)
