"""A data set as others publish it, for tests that change one thing of it."""

import shutil
from pathlib import Path

import pytest
from changed_datasets import write_brought


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight episodes of five frames, which no test may change."""
    return write_brought(tmp_path_factory.mktemp("brought") / "original")


@pytest.fixture
def root(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(original, tmp_path / "dataset"))
