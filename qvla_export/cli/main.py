"""Entry point: one line for errors a user can mend, a traceback for the rest."""

import logging
import sys

from rich.console import Console

from qvla_export.errors import QvlaError


def main() -> None:
    """Run the `qvla` command; exit 2 with one message on an error a user can mend."""
    from qvla_export.cli.commands import app

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    for noisy in ("httpx", "torch", "onnxscript", "onnx_ir", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        app()
    except QvlaError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; the same command continues", style="yellow")
        sys.exit(130)
