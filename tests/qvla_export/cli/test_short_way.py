"""How many of our rooms and modules a command goes through: what one must read to follow it."""

import inspect
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from command_runs import Inputs, Outcome, qvla
from house import MODULES, room_of

# Nouns that everything speaks of; every command goes through them.
VOCABULARY = {"qvla_export.shared", "qvla_export.quantizer", "qvla_export.policies"}
MOST_ROOMS = 6
# A command that takes a longer way through its rooms should say why.
MOST_MODULES = 30

FILES = {str(path): module for module, path in MODULES.items()}


def modules_called(*arguments: object) -> dict[str, set[str]]:
    """Return our modules whose functions a command calls, with the functions' names.

    Bodies of modules and classes run at import and are no functions; that of a function has
    variables of its own, which its code object says.
    """
    called: dict[str, set[str]] = defaultdict(set)

    def note(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        module = FILES.get(code.co_filename)
        if event == "call" and module is not None and code.co_flags & inspect.CO_OPTIMIZED:
            called[module].add(code.co_name)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        outcome = qvla(*arguments)
    finally:
        sys.setprofile(before)
    assert outcome.code == 0, outcome.err
    return dict(called)


@pytest.fixture
def arguments(deployed: tuple[Path, Outcome], inputs: Inputs, tmp_path: Path) -> tuple[object, ...]:
    """A plain `qvla sensitivities` that has all to do: nearest codes, one process."""
    run = tmp_path / "run"
    shutil.copytree(deployed[0] / "calibration", run / "calibration")
    return (
        "sensitivities", "--run", run, "--policy", inputs.checkpoint, "--quantizer", "nearest"
    )  # fmt: skip


def test_sensitivities_go_a_short_way(arguments: tuple[object, ...]) -> None:
    # Once before: what is imported late calls functions of its own while it is.
    assert qvla(*arguments).code == 0
    (Path(str(arguments[2])) / "sensitivities.safetensors").unlink()
    called = modules_called(*arguments)
    assert "measure_first_order" in called["qvla_export.sensitivity.estimators.first_order"]
    beside = {name: calls for name, calls in called.items() if room_of(name) not in VOCABULARY}
    rooms = {room_of(name) for name in beside}
    assert len(rooms) <= MOST_ROOMS, sorted(rooms)
    assert len(beside) <= MOST_MODULES, sorted(beside)
