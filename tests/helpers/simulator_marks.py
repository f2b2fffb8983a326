"""Marks of tests that need a simulator of another environment: make simulators."""

import importlib.util

import pytest


def simulator_marks(package: str, name: str) -> list[pytest.MarkDecorator]:
    """Return a module's `pytestmark`: slow, and skipped where the package is not installed."""
    return [
        pytest.mark.slow,
        pytest.mark.timeout(3600),
        # The simulators' packages warn of their own syntax and deprecations.
        pytest.mark.filterwarnings("ignore"),
        pytest.mark.skipif(
            importlib.util.find_spec(package) is None, reason=f"no {name} here: make simulators"
        ),
    ]
