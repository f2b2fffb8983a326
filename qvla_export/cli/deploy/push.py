"""`qvla push`: a release to many robots over ssh."""

from pathlib import Path
from typing import Annotated

import typer

from qvla_export.cli.options import Existing, JsonOption
from qvla_export.cli.progress import print_result, progress_shown

_ROBOTS = Existing("file of robots", "write one: docs/fleet.md")
_REPOSITORY = Existing("repository", "make it first with: qvla release publish")


def push(
    robots: Annotated[Path, typer.Argument(help="robots.toml.", callback=_ROBOTS.require)],
    waves: Annotated[
        list[str] | None,
        typer.Option(
            "--wave", help="Robots up to date after it, or per cent; default: 1 20% 100%."
        ),
    ] = None,
    repository: Annotated[
        Path | None, typer.Option(help="Folder of releases.", callback=_REPOSITORY.require)
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, max=256, help="Robots at a time.")] = 16,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say who would get what.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Bring releases to robots over ssh, in waves; exit 1 if a robot does not answer healthy."""
    from qvla_export.pipeline.fleet.push import PushRequest, plan_push
    from qvla_export.pipeline.fleet.push import push as push_release

    request = PushRequest(robots, repository, tuple(waves or PushRequest.waves), parallel)
    plan = plan_push(request)
    if dry_run:
        print_result(plan, plan.lines(), as_json)
        return
    with progress_shown(silent=as_json) as on_progress:
        result = push_release(plan, on_progress)
    print_result(result, result.lines(), as_json)
    if not result.passed:
        raise typer.Exit(1)
