"""Command that runs a policy on a robot: run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from qvla_export.cli.options import (
    CamerasOption,
    SeedOption,
    StateColumnOption,
    ThreadsOption,
    WeightsOption,
)
from qvla_export.errors import QvlaError


@dataclass(frozen=True)
class RunOptions:
    """What the command line says, unparsed; its help says what each means."""

    policy: str
    source: str
    rate_hz: float
    mode: Literal["receding", "ensemble"] = "receding"
    execute: int | None = None
    ensemble_decay: float = 0.01
    instruction: str | None = None
    hold: str | None = None
    safe: str | None = None
    limits: str | None = None
    max_step: str | None = None
    max_action_age_ms: float | None = None
    max_observation_age_ms: float | None = None
    hold_ms: float = 500.0
    ramp_ms: float = 1000.0
    give_up_s: float = 10.0
    commands: Literal["none", "stdout"] = "none"
    record: Path | None = None
    live: str | None = None
    seconds: float | None = None
    simulated_time: bool = False
    seed: int = 1_000_000
    cameras: tuple[str, ...] = ()
    state_column: str = "observation.state"
    joints: str = ""
    command_joints: str = ""
    threads: int | None = None
    weights: Literal["packed", "unpacked"] = "packed"

    @property
    def source_kind(self) -> str:
        """ "simulator", "episode", "camera", "stdin" or "ros2"."""
        kind, _, place = self.source.partition(":")
        placed = kind in ("simulator", "episode", "camera") and place
        if not placed and self.source not in ("stdin", "ros2"):
            raise QvlaError(
                "--source is simulator:TASK, episode:DATASET#N, camera:DEVICE, stdin or ros2, "
                f"got {self.source!r}"
            )
        return kind

    @property
    def place(self) -> str:
        """What follows the kind."""
        return self.source.partition(":")[2]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(run)


def run(
    policy: Annotated[str, typer.Argument(help="Bundle folder, or URL of a `qvla serve`.")],
    source: Annotated[
        str,
        typer.Option(
            help="simulator:TASK, episode:DATASET#N, camera:DEVICE or camera:NAME=DEVICE,..., "
            "stdin (a POST /act body a line), ros2 (a node, which is also the robot)"
        ),
    ],
    rate_hz: Annotated[float, typer.Option(help="Commands a second, as the policy was trained.")],
    mode: Annotated[
        Literal["receding", "ensemble"],
        typer.Option(help="receding: the newest chunk; ensemble: all chunks, averaged as in ACT."),
    ] = "receding",
    execute: Annotated[
        int | None, typer.Option(min=1, help="Actions of a chunk before the next; default all.")
    ] = None,
    ensemble_decay: Annotated[
        float, typer.Option(help="ensemble: weight exp(-decay * i) of the i-th oldest chunk.")
    ] = 0.01,
    instruction: Annotated[str | None, typer.Option(help="What to do; needed for cameras.")] = None,
    hold: Annotated[
        str | None,
        typer.Option(
            help="What holds the robot still, per dimension: 0 for displacements and speeds, "
            "last for positions and grippers; one entry stands for all. Known for the simulator."
        ),
    ] = None,
    safe: Annotated[
        str | None, typer.Option(help="Where a run ends, numbers or hold per dimension.")
    ] = None,
    limits: Annotated[
        str | None,
        typer.Option(help="LOW:HIGH per dimension, instead of the bundle's statistics."),
    ] = None,
    max_step: Annotated[
        str | None, typer.Option(help="Largest change from one command to the next.")
    ] = None,
    max_action_age_ms: Annotated[
        float | None,
        typer.Option(help="No command comes of an older observation; default a chunk and a slot."),
    ] = None,
    max_observation_age_ms: Annotated[
        float | None, typer.Option(help="Older ones are dropped; default half of the above.")
    ] = None,
    hold_ms: Annotated[float, typer.Option(help="Hold this long before ramping.")] = 500.0,
    ramp_ms: Annotated[float, typer.Option(help="Duration of the ramp to --safe.")] = 1000.0,
    give_up_s: Annotated[
        float, typer.Option(help="End in a fault after this long without a usable action.")
    ] = 10.0,
    commands: Annotated[
        Literal["none", "stdout"],
        typer.Option(help="Where commands go; stdout: a JSON line each. The simulator is a robot."),
    ] = "none",
    record: Annotated[
        Path | None,
        typer.Option(help="FILE.mcap: pictures, actions and slots; else a JSON line a slot."),
    ] = None,
    live: Annotated[
        str | None,
        typer.Option(
            help="PORT or HOST:PORT of a page that shows the run, and /metrics; others than this "
            "machine need QVLA_TOKEN."
        ),
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="Stop after this long.")] = None,
    simulated_time: Annotated[
        bool,
        typer.Option("--simulated-time", help="No waiting, and thinking takes no time."),
    ] = False,
    seed: SeedOption = 1_000_000,
    cameras: CamerasOption = None,
    state_column: StateColumnOption = "observation.state",
    joints: Annotated[str, typer.Option(help="ros2: joints of the state, in its order.")] = "",
    command_joints: Annotated[
        str, typer.Option(help="ros2: joints the actions are positions of: trajectories.")
    ] = "",
    threads: ThreadsOption = None,
    weights: WeightsOption = "packed",
) -> None:
    """Run a policy closed loop, on time: safe commands out, whatever is late or broken.

    Exits with 0 after a clean stop (end of the source, --seconds, SIGINT, SIGTERM) and with 2
    after faults. The last command is always the safe action.
    """
    from qvla_export.cli.run_parts import run_policy

    options = RunOptions(
        policy=policy,
        source=source,
        rate_hz=rate_hz,
        mode=mode,
        execute=execute,
        ensemble_decay=ensemble_decay,
        instruction=instruction,
        hold=hold,
        safe=safe,
        limits=limits,
        max_step=max_step,
        max_action_age_ms=max_action_age_ms,
        max_observation_age_ms=max_observation_age_ms,
        hold_ms=hold_ms,
        ramp_ms=ramp_ms,
        give_up_s=give_up_s,
        commands=commands,
        record=record,
        live=live,
        seconds=seconds,
        simulated_time=simulated_time,
        seed=seed,
        cameras=tuple(cameras or ()),
        state_column=state_column,
        joints=joints,
        command_joints=command_joints,
        threads=threads,
        weights=weights,
    )
    result = run_policy(options)
    # Not on stdout where the commands are.
    typer.echo(
        f"run: {result.state.value} after {result.seconds:.1f} s, {result.reason}; "
        + ", ".join(f"{name} {count}" for name, count in result.counters.items()),
        err=commands == "stdout",
    )
    if not result.ok:
        raise typer.Exit(2)
