"""What a long command says of itself where nobody looks at a terminal."""

import io
import re
import shutil
from pathlib import Path

import pytest
from command_runs import Inputs, Outcome
from rich.console import Console

from qvla_export.cli.progress import _Lines, print_texts, progress_shown
from qvla_export.pipeline.progress import NumberedSteps, Progress, bar, finish
from qvla_export.shared.tables.text_table import TextTable

STEPS = [
    "calibration",
    "sensitivities of every channel and width",
    "agreement with exact measurement",
    "float: plan, bundle, engine, action error",
    "w4: plan, bundle, engine, action error",
    "w4-rtn: plan, bundle, engine, action error",
    "latency, in process and served over HTTP",
    "recommendation and report",
]


def step_lines(outcome: Outcome) -> list[str]:
    """Return the lines of steps, with their seconds left out."""
    lines = [line for line in outcome.err.splitlines() if line.startswith("step ")]
    return [re.sub(r", \d+ s$", "", line) for line in lines]


def begun_and_ended(states: list[str]) -> list[str]:
    count = len(STEPS)
    texts = [f"step {i} of {count}: {work}" for i, work in enumerate(STEPS, 1)]
    ends = [f"{text}: {state}" for text, state in zip(texts, states, strict=True)]
    return [line for pair in zip(texts, ends, strict=True) for line in pair]


def test_deploy_prints_one_line_when_a_step_begins_and_one_when_it_ends(
    deployed: tuple[Path, Outcome],
) -> None:
    assert step_lines(deployed[1]) == begun_and_ended(["made"] * len(STEPS))


def test_deploy_says_which_steps_were_kept(
    deployed: tuple[Path, Outcome], inputs: Inputs, tmp_path: Path
) -> None:
    again = inputs.deploy(shutil.copytree(deployed[0], tmp_path / "run"))
    assert again.code == 0, again.err
    assert step_lines(again) == begun_and_ended(["kept"] * (len(STEPS) - 1) + ["made"])


def test_a_step_is_kept_if_all_that_it_called_was() -> None:
    heard: list[Progress] = []
    steps = NumberedSteps(heard.append, 2)
    with steps.next("plans") as hear:
        finish(hear, "one", kept=True)
        finish(hear, "other", kept=False)
    with steps.next("bundle") as hear:
        bar(hear, "parts")(1, 3)
        finish(hear, "parts", kept=True)
    assert heard == [
        Progress("plans", step=1, steps=2),
        Progress("plans", step=1, steps=2, state="made"),
        Progress("bundle", step=2, steps=2),
        Progress("bundle", 1, 3, step=2, steps=2, detail="parts"),
        Progress("bundle", step=2, steps=2, state="kept"),
    ]


def test_a_log_hears_now_and_then_how_long_it_takes_yet() -> None:
    said: list[str] = []
    now = [0.0]
    lines = _Lines(said.append, lambda: now[0])
    for second in range(0, 101, 10):
        now[0] = float(second)
        lines.hear(Progress("moments", second, 1000))
    now[0] = 107.0
    lines.hear(Progress("moments", state="made"))
    assert said == [
        "moments",
        "moments: 30 of 1000, about 16 min left",
        "moments: 60 of 1000, about 16 min left",
        "moments: 90 of 1000, about 15 min left",
        "moments: made, 107 s",
    ]


def test_the_estimate_counts_from_where_a_part_of_a_step_began() -> None:
    said: list[str] = []
    now = [0.0]
    lines = _Lines(said.append, lambda: now[0])

    def hear(second: float, detail: str, done: int) -> None:
        now[0] = second
        lines.hear(Progress("w4", done, 100, step=5, steps=9, detail=detail))

    hear(0, "rounding", 0)
    hear(29, "rounding", 100)
    hear(40, "export", 50)  # an interrupted one goes on here
    hear(60, "export", 60)
    hear(71, "export", 75)
    assert said == [
        "step 5 of 9: w4",
        "step 5 of 9: w4: export: 50 of 100",
        "step 5 of 9: w4: export: 75 of 100, about 31 s left",
    ]


def test_a_terminal_sees_bars_and_a_silent_process_nothing() -> None:
    drawn = io.StringIO()
    terminal = Console(file=drawn, force_terminal=True, width=120)
    with progress_shown(terminal) as on_progress:
        with NumberedSteps(on_progress, 3).next("bundle") as hear:
            bar(hear, "parts")(1, 4)
        finish(on_progress, "report", kept=True)
    assert "step 1 of 3: bundle" in drawn.getvalue()
    assert "report (kept)" in drawn.getvalue()
    nothing = io.StringIO()
    with progress_shown(Console(file=nothing), silent=True) as on_progress:
        finish(on_progress, "report", kept=True)
    assert not nothing.getvalue()


def test_texts_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    table = TextTable(
        ("name", "what", "ms"), (("[red]w4[/]", ":smile:", "1.0 [0.9, 1.1]"),), "of [x]"
    )
    print_texts(["before [bold]", table.with_rows([*table.rows, ("w", "x" * 90, "")])], width=60)
    shown = capsys.readouterr().out
    first, title, *_ = shown.splitlines()
    assert first == "before [bold]" and title.strip() == "of [x]"
    for text in ("[red]w4[/]", ":smile:", "1.0 [0.9, 1.1]"):
        assert text in shown
    # What does not fit goes on in the next line; nothing is cut.
    assert shown.count("x") == 90 + 1


def test_works_side_by_side_are_said_once_each_and_end_once_each() -> None:
    said: list[str] = []
    now = [0.0]
    lines = _Lines(said.append, lambda: now[0])
    for second in (0, 10, 31):
        now[0] = second
        for name in ("arm-01", "arm-02"):
            lines.hear(Progress(name, second, 62, detail="install"))
    lines.hear(Progress("arm-02", state="made"))
    assert said == [
        "arm-01",
        "arm-02",
        "arm-01: install: 31 of 62, about 31 s left",
        "arm-02: install: 31 of 62, about 31 s left",
        "arm-02: made, 31 s",
    ]
