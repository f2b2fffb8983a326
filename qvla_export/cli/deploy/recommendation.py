"""What `qvla deploy` says at the end: which setting, by which bounds, and what to type next."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from qvla_export.pipeline.recommend.open_loop import OpenLoopError
    from qvla_export.pipeline.recommend.recommendation import Recommendation

ToleranceMmOption = Annotated[
    float | None,
    typer.Option(
        "--tolerance-mm",
        help="Most that a translation may be off float's in nine actions of ten, mm; default: a "
        "tenth of the float policy's own median error against the demonstrations.",
    ),
]
ToleranceDegOption = Annotated[
    float | None,
    typer.Option("--tolerance-deg", help="The same of rotations and joints, degrees."),
]
ToleranceGripperOption = Annotated[
    float | None,
    typer.Option("--tolerance-gripper", help="The same of a gripper, in its own units."),
]
ActionNamesOption = Annotated[
    str | None,
    typer.Option(
        "--action-names",
        help="Names of the action's numbers, as x,y,z,roll,pitch,yaw,gripper; default: the "
        "checkpoint's or the data set's.",
    ),
]
UnitMmOption = Annotated[
    float | None,
    typer.Option("--unit-mm", help="Millimetres of one unit of a translation: 1000 for metres."),
]
UnitDegOption = Annotated[
    float | None,
    typer.Option("--unit-deg", help="Degrees of one unit of a rotation: 57.2958 for radians."),
]


def names_in(text: str | None) -> tuple[str, ...]:
    """Return the names in a comma-separated text."""
    return tuple(name.strip() for name in text.split(",")) if text else ()


def say_recommendation(result: "Recommendation") -> None:
    """Print errors against the demonstrations, bounds, the choice and the next commands."""
    from qvla_export.pipeline.recommend.sentences import bound_sentences

    Console().print(_errors(result))
    lines = ["recommendation:", *bound_sentences(result.bounds), *result.sentences]
    for line in (*lines, *(f"doubt: {text}" for text in result.warnings)):
        typer.echo(line)
    for place, heading in (("here", "next, here:"), ("robot", f"then, on the {result.target}:")):
        commands = [command for command in result.commands if command.where == place]
        if commands:
            typer.echo(heading)
        for command in commands:
            typer.echo(f"  {command.line}  # {command.purpose}")


def _errors(result: "Recommendation") -> Table:
    table = Table(
        title="open loop on held-out observations, median (9 of 10): error against the "
        "demonstrations; distance from the float policy"
    )
    table.add_column("setting")
    for group in result.space.present():
        table.add_column(f"{group}, {result.space.unit(group)[0]}", justify="right")
    table.add_row("float policy", *_cells(result.float_error))
    for candidate in result.candidates:
        table.add_row(candidate.setting, *_cells(candidate.error))
    return table


def _cells(error: "OpenLoopError") -> list[str]:
    return [
        (f"{e.error.median:.3g} ({e.error.p90:.3g}); " if e.error is not None else "")
        + f"{e.shift.median:.2g} ({e.shift.p90:.2g})"
        for e in error.groups.values()
    ]
