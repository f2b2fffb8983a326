"""Entry point: one line for errors a user can mend, a traceback for the rest."""

import logging
import os
import sys

from qvla_export.shared.errors import QvlaError, missing_extra

# What typer exits with after Ctrl-C.
_INTERRUPTED = 130


def main() -> None:
    """Run the `qvla` command; exit 2 with one message on an error a user can mend."""
    from qvla_export.cli.app import app

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    for noisy in ("httpx", "OpenGL", "torch", "onnxscript", "onnx_ir", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        app(prog_name="qvla")
    except (QvlaError, OSError) as error:
        # A library's message may have several lines; scripts and logs want one.
        _say(f"error: {_speaker()}{' '.join(str(error).split())}", "red")
        sys.exit(2)
    except ModuleNotFoundError as error:
        if (missing := missing_extra(error)) is None:
            raise
        _say(f"error: {missing}", "red")
        sys.exit(2)
    except SystemExit as stop:
        if stop.code == _INTERRUPTED:
            _say("interrupted; the same command continues", "yellow")
        raise


def _speaker() -> str:
    """Name this process where torchrun started several."""
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    return "" if size == "1" else f"process {rank} of {size}: "


def _say(text: str, style: str) -> None:
    from rich.console import Console

    # soft_wrap: a line stays one line where nobody looks at a terminal.
    console = Console(stderr=True)
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
