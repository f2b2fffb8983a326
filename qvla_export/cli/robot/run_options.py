"""Options of `qvla run`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from qvla_export.cli.options import A_POLICY

RunPolicyArgument = Annotated[
    str, typer.Argument(help="Bundle folder, or URL of a `qvla serve`.", callback=A_POLICY.require)
]
SourceOption = Annotated[
    str,
    typer.Option(
        help="simulator:TASK, episode:DATASET#N, camera:DEVICE or camera:NAME=DEVICE,..., "
        "stdin (a POST /act body a line), ros2 (a node, which is also the robot)"
    ),
]
RateOption = Annotated[float, typer.Option(help="Commands a second, as the policy was trained.")]
ModeOption = Annotated[
    Literal["receding", "ensemble"],
    typer.Option(help="receding: the newest chunk; ensemble: all chunks, averaged as in ACT."),
]
ExecuteOption = Annotated[
    int | None, typer.Option(min=1, help="Actions of a chunk before the next; default all.")
]
EnsembleDecayOption = Annotated[
    float,
    typer.Option(help="ensemble: weight exp(-decay * i) of the i-th oldest chunk; UniVLA: -0.1."),
]
RollForwardOption = Annotated[
    str | None,
    typer.Option(
        help="Show the state in which the chunk will begin. Per dimension of an action: what 1 "
        "adds to the state's number at its place; position; or stays."
    ),
]
ResponseOption = Annotated[
    str,
    typer.Option(help="Of --roll-forward: shares of a command done in its slot, the next, ..."),
]
InstructionOption = Annotated[str | None, typer.Option(help="What to do; needed for cameras.")]
HoldOption = Annotated[
    str | None,
    typer.Option(
        help="What holds the robot still, per dimension: 0 for displacements and speeds, "
        "last for positions and grippers; one entry stands for all. Known for the simulator."
    ),
]
SafeOption = Annotated[
    str | None, typer.Option(help="Where a run ends, numbers or hold per dimension.")
]
LimitsOption = Annotated[
    str | None,
    typer.Option(help="LOW:HIGH per dimension, instead of the bundle's statistics."),
]
MaxStepOption = Annotated[
    str | None, typer.Option(help="Largest change from one command to the next.")
]
SeamLimitOption = Annotated[
    str | None,
    typer.Option(help="receding: largest change where a chunk follows another, any for a gripper."),
]
MaxActionAgeOption = Annotated[
    float | None,
    typer.Option(
        help="No command comes of an older observation; default a chunk and a slot, with "
        "--roll-forward two chunks and a slot."
    ),
]
MaxObservationAgeOption = Annotated[
    float | None, typer.Option(help="Older ones are dropped; default half of the above.")
]
HoldMsOption = Annotated[float, typer.Option(help="Hold this long before ramping.")]
RampMsOption = Annotated[float, typer.Option(help="Duration of the ramp to --safe.")]
GiveUpOption = Annotated[
    float, typer.Option(help="End in a fault after this long without a usable action.")
]
CommandsOption = Annotated[
    Literal["none", "stdout"],
    typer.Option(help="Where commands go; stdout: a JSON line each. The simulator is a robot."),
]
RecordOption = Annotated[
    Path | None,
    typer.Option(help="New FILE.mcap: pictures, actions and slots; else a JSON line a slot."),
]
LiveOption = Annotated[
    str | None,
    typer.Option(
        help="PORT or HOST:PORT of a page that shows the run, and /metrics; others than this "
        "machine need QVLA_TOKEN."
    ),
]
SecondsOption = Annotated[float | None, typer.Option(help="Stop after this long.")]
SimulatedTimeOption = Annotated[
    bool,
    typer.Option("--simulated-time", help="No waiting, and thinking takes no time."),
]
JointsOption = Annotated[str, typer.Option(help="ros2: joints of the state, in its order.")]
CommandJointsOption = Annotated[
    str, typer.Option(help="ros2: joints the actions are positions of: trajectories.")
]
