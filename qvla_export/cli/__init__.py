"""The `qvla` command: the only modules that reach across the stages, lazily."""

from qvla_export.cli.main import main

__all__ = ["main"]
