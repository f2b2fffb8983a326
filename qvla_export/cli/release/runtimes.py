"""`qvla runtime`: what a robot runs releases with."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from qvla_export.cli.options import A_FILE, JsonOption
from qvla_export.cli.progress import print_json, progress_shown
from qvla_export.shared.errors import QvlaError

_FILE = A_FILE.require


def build(
    jetpack: Annotated[Literal["6", "7"], typer.Option(help="The robot's: 6 or 7.")],
    output: Annotated[Path, typer.Option(help="The file; .lock and .json go beside it.")],
    lock: Annotated[
        Path | None, typer.Option(help="Versions and digests of before.", callback=_FILE)
    ] = None,
    source: Annotated[
        Path | None, typer.Option(help="Checkout of QVLA; default: this one.", callback=_FILE)
    ] = None,
    python: Annotated[
        Path | None, typer.Option(help="Tar archive of a newer Python.", callback=_FILE)
    ] = None,
    python_sha256: Annotated[str, typer.Option(help="Its SHA-256.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Pack QVLA and what it needs on a robot into one file, every wheel by its digest."""
    from qvla_export.pipeline.runtime import robot_runtime as runtime
    from qvla_export.pipeline.runtime.robots import JETPACKS

    if (python is None) != (not python_sha256):
        raise QvlaError("--python and --python-sha256 go together: an archive and its digest")
    own = None if python is None else runtime.OwnPython(python, python_sha256)
    checkout = source or runtime.CHECKOUT
    request = runtime.RuntimeRequest(JETPACKS[jetpack], output, checkout, lock, own)
    with progress_shown(silent=as_json) as on_progress:
        built = runtime.build_runtime(request, on_progress)
    if as_json:
        print_json(built.to_json())
        return
    typer.echo("\n".join([*built.lines(), f"-> {output}"]))
