"""Programs that resolve, fetch and pack; each runs in a process of its own."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence

from qvla_export.shared.errors import EXTRAS, MissingExtra, QvlaError

_TOOLS = ("uv", "pip", "pex", "packaging")
_SHOWN = 1500
# Files of archives are dated so: equal inputs make equal archives.
EPOCH = "315532800"


class FailedTool(QvlaError):
    """A program that a runtime is made with did not do its work."""


def require_tools() -> None:
    """Check that the programs are there.

    Raises:
        MissingExtra: one is not.
    """
    for name in _TOOLS:
        if importlib.util.find_spec(name) is None:
            raise MissingExtra(f"this command needs {name}: pip install 'qvla[{EXTRAS['pex']}]'")


def run_tool(name: str, arguments: Sequence[object], failure: str) -> None:
    """Run a program's module.

    Args:
        name: of the module.
        arguments: of the program.
        failure: what it means if the program fails, and what to do.

    Raises:
        FailedTool: it did, with the end of what it says.
    """
    words = [sys.executable, "-m", name, *map(str, arguments)]
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, "SOURCE_DATE_EPOCH": EPOCH, "PYTHONHASHSEED": "0"},
    )
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip())[-_SHOWN:]
        raise FailedTool(f"{failure}; {name} says: {said}")
