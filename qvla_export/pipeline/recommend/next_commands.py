"""What to type next: from a bundle on this machine to actions on the target's."""

import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qvla_export.shared.target import Target

_PORT = 8777


@dataclass(frozen=True)
class NextCommand:
    """One line to type."""

    # On this machine, or on the robot.
    where: Literal["here", "robot"]
    line: str
    # What it does, in words.
    purpose: str


def next_commands(
    target: Target, setting: str, bundle: Path, native: bool
) -> tuple[NextCommand, ...]:
    """Return the commands that take a bundle to served actions, in their order.

    Where this machine runs the target's engines, all of them work here. Where it does not, those
    for the robot name the folder that the copy makes there.

    Args:
        target: what the bundle was made for.
        setting: its name, and the folder's on the robot.
        bundle: its folder, as it is reached from here.
        native: whether this machine runs the target's engines.
    """
    place = shlex.quote(str(bundle))
    if native:
        return (
            *_on_the_machine(target, "here", place),
            _copy(place, setting, "to another machine, where the same lines work"),
        )
    return (
        NextCommand("here", f"qvla check {place} --target {target.name}", "its rules, once more"),
        _copy(place, setting, f"QVLA is installed there as {_guide(target)} says"),
        *_on_the_machine(target, "robot", shlex.quote(setting)),
    )


def with_settings(command: str, settings: Sequence[str]) -> str | None:
    """Return a `qvla deploy` command with other settings; None where there was no command."""
    words = shlex.split(command)
    if words[:2] != ["qvla", "deploy"]:
        return None
    others: list[str] = []
    skip = False
    for word in words:
        if not skip and word != "--settings" and not word.startswith("--settings="):
            others.append(word)
        skip = word == "--settings"
    return shlex.join([*others, "--settings", ",".join(settings)])


def _on_the_machine(
    target: Target, where: Literal["here", "robot"], place: str
) -> tuple[NextCommand, ...]:
    build = NextCommand(where, f"qvla build {place}", "engines, minutes; they load only there")
    return (
        *((build,) if target.runtime.startswith("tensorrt") else ()),
        NextCommand(where, f"qvla verify {place} --latency", "actions against torch's, and time"),
        NextCommand(where, f"qvla serve {place} --port {_PORT}", "actions over HTTP"),
    )


def _copy(place: str, setting: str, purpose: str) -> NextCommand:
    folder = shlex.quote(setting)
    # What this machine has; scp would put a second copy inside the folder of a first.
    if shutil.which("rsync") is not None:
        line = f"rsync -a {place}/ ROBOT:{folder}/"
    else:
        line = f"scp -r {place} ROBOT:{folder}"
    return NextCommand("here", line, f"put your robot's name for ROBOT; {purpose}")


def _guide(target: Target) -> str:
    return "docs/orin.md" if target.name.startswith("orin") else "docs/serving.md"
