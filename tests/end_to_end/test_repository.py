"""What is tracked stays small, and names nothing of the machine it was written on."""

import re
import subprocess
from pathlib import Path

import pytest
from places import ROOT

MEGABYTE = 1_000_000
# Where data and checkpoints lie.
DATA = (ROOT / "checkpoints", ROOT / "tests" / "data")
# Written in pieces, or this file would name them too.
FORBIDDEN = {
    "an absolute path of a workplace": re.compile("/" + r"(work|root|home/\w+)/"),
    "a package registry": re.compile(
        r"(pypi|pythonhosted|npmjs|anaconda)\." + r"(org|com)|/opt/(pypi|wheels)|index[-_]url"
    ),
}


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def test_the_repository_is_small(tracked: list[Path]) -> None:
    sizes = {path: path.stat().st_size for path in tracked}
    large = {str(path.relative_to(ROOT)): n for path, n in sizes.items() if n > 25 * MEGABYTE}
    assert not large
    data = [path for path in sizes if any(path.is_relative_to(folder) for folder in DATA)]
    assert sum(sizes[path] for path in data) < 40 * MEGABYTE
    # Code, tests and pages beside them.
    assert sum(sizes.values()) < 50 * MEGABYTE


def test_no_text_names_this_machine_or_a_registry(tracked: list[Path]) -> None:
    found = []
    for path in tracked:
        data = path.read_bytes()
        if b"\0" in data:
            continue
        for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
            for what, pattern in FORBIDDEN.items():
                if pattern.search(line):
                    found.append(f"{path.relative_to(ROOT)}:{number} names {what}: {line[:120]}")
    assert not found, "\n".join(found)
