"""The `qvla` command in this process, and the inputs of a run on a tiny policy."""

import contextlib
import io
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from qvla_export.cli import main
from qvla_export.shared.artifacts import sha256_file

SETTINGS = "float,w4,w4-rtn"


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that an error is, after those of steps that were done."""
        assert self.code != 0, self.out
        assert "Traceback" not in self.err
        *before, last = self.err.splitlines()
        assert not [line for line in before if line.startswith("error: ")], self.err
        assert last.startswith("error: ")
        return last


def qvla(*arguments: object) -> Outcome:
    """Run the command in this process, as its entry point does."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["qvla", *map(str, arguments)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as stop:
                code = int(stop.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def listing(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256_file(p) for p in folder.rglob("*") if p.is_file()}


@dataclass(frozen=True)
class Inputs:
    checkpoint: Path
    dataset: Path

    def deploy(self, run: Path, *more: object) -> Outcome:
        return qvla(
            *("deploy", "--policy", self.checkpoint, "--dataset", self.dataset, "--run", run),
            *("--settings", SETTINGS, "--episodes", 0, "--count", 6, "--held-out", 6),
            *("--check-pairs", 6, "--samples", 5, *more),
        )
