"""Where golden data of upstream's code lies, and which of its files the tests have read."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from places import DATA, ROOT

_READ: set[str] = set()


def oracle_root() -> Path:
    """Return the folder of golden data: `QVLA_ORACLES`, else ../shared/oracles, else the subset.

    The subset is committed; the environment's folder must be there.
    """
    named = os.environ.get("QVLA_ORACLES")
    if named is not None and not Path(named).is_dir():
        raise pytest.UsageError(f"QVLA_ORACLES must name a folder of golden data, got {named!r}")
    shared = ROOT.parent / "shared" / "oracles"
    if named is not None:
        return Path(named)
    return shared if shared.is_dir() else DATA / "oracles"


def watch_reading() -> None:
    """Note from now on which golden files this process opens."""
    root = f"{oracle_root().resolve()}{os.sep}"

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | os.PathLike):
            # It looks through every file that git knows, whatever is in it.
            if "test_repository.py" in os.environ.get("PYTEST_CURRENT_TEST", ""):
                return
            path = os.path.realpath(arguments[0])
            if path.startswith(root):
                _READ.add(path.removeprefix(root))

    sys.addaudithook(note)


class ReadingReport:
    """Plugin of pytest: the closing lines say which golden files no test has opened.

    With xdist, every worker hands in what it has opened.
    """

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        output = getattr(session.config, "workeroutput", None)
        if output is not None:
            output["oracles"] = sorted(_READ)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        _READ.update(getattr(node, "workeroutput", {}).get("oracles", ()))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print how many golden files were read, and the names of some that were not."""
        if not _READ:
            return
        root = oracle_root()
        files = {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()}
        # What people read is no golden data.
        files = {name for name in files if not name.endswith(".md")}
        left = sorted(files - _READ)
        terminalreporter.write_line(
            f"golden files in {root}: {len(files) - len(left)} of {len(files)} read"
            + (f", not read: {', '.join(left[:8])}" if left else "")
            + (f" and {len(left) - 8} more" if len(left) > 8 else "")
        )
