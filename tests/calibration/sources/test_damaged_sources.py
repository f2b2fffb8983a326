"""Damaged recordings of every format are read or refused: never a traceback, never a warning."""

import logging
from pathlib import Path

import numpy as np
import pytest
from small_sources import SOURCES, SmallSource, damaged, write_source

from calibration.calibration_set import sample_dataset
from calibration.sources.formats import open_source
from qvla_export.shared.errors import QvlaError

# Of metadata in the default suite, of data a fourth; and of each in the slow one.
FEW, MANY = 100, 10_000
COUNTS = [
    pytest.param(FEW, id="few"),
    pytest.param(MANY, id="many", marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
]
# Of the others, metadata and data are one file.
WITH_DATA = [name for name in SOURCES if name not in ("libero", "aloha", "mcap")]


def draw(source: SmallSource, skip: bool) -> bool:
    """Whether a recording was read; it may also be refused."""
    opened = None
    try:
        opened = open_source(source.root, source.keys)
        drawn = sample_dataset(opened, 1, 1, 0, 2, skip)
    except QvlaError as error:
        assert str(error).strip()
        return False
    finally:
        if opened is not None:
            opened.close()
    assert len(drawn.observations) == len(drawn.held_out) == 1
    return True


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(
    ("name", "kind"), [*((n, "metadata") for n in SOURCES), *((n, "data") for n in WITH_DATA)]
)
def test_damage_is_read_or_refused(
    tmp_path: Path, name: str, kind: str, count: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    source = write_source(name, tmp_path / "recording")
    assert draw(source, False)
    files = sorted(path for path in source.root.rglob("*") if path.is_file())
    told = {path for pattern in source.metadata for path in source.root.rglob(pattern)}
    chosen = [path for path in files if (path in told) == (kind == "metadata")]
    whole = {path: path.read_bytes() for path in chosen}
    random = np.random.default_rng((len(name), count, kind == "data"))
    read = 0
    for _ in range(count // 4 if (kind, count) == ("data", FEW) else count):
        path = chosen[int(random.integers(0, len(chosen)))]
        path.write_bytes(damaged(whole[path], random))
        read += draw(source, bool(random.integers(0, 2)))
        path.write_bytes(whole[path])
    assert draw(source, False)
    print(f"{name} {kind}: {count} damaged, {read} read")
    assert read < count
