"""Options that several commands share, with their units and defaults."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qvla_export.pipeline.policy_source import PolicySource
from qvla_export.shared.errors import QvlaError

if TYPE_CHECKING:
    from calibration.sources.lerobot import LeRobotDataset
    from qvla_export.policies.base import Policy

# Under torchrun only --run-folder can be written: it takes --run for one of its own.
RunOption = Annotated[
    Path, typer.Option("--run", "--run-folder", help="Run folder, one artifact a stage.")
]
PolicyOption = Annotated[
    Path, typer.Option("--policy", help="Checkpoint folder in the OpenVLA-OFT layout.")
]
TargetOption = Annotated[
    str,
    typer.Option("--target", help="Device and runtime: cpu, cuda, rtx4070, orin-jp7 or orin-jp6."),
]
ZeroPointsOption = Annotated[
    bool,
    typer.Option(
        "--zero-points",
        help="Planned weights have a zero point beside every scale: codes that need not lie "
        "around 0. Target cpu only; plans follow the sensitivities.",
    ),
]
UnnormKeyOption = Annotated[
    str | None,
    typer.Option(help="Data set whose statistics un-normalize actions; needed if several."),
]
PresetOption = Annotated[
    str | None,
    typer.Option(help="libero, aloha or bridge, for a checkpoint without qvla_policy.json."),
]
DatasetOption = Annotated[
    Path | None,
    typer.Option("--dataset", help="LeRobotDataset v3.0 folder; without it, the simulator."),
]
CamerasOption = Annotated[
    list[str] | None,
    typer.Option(
        "--camera", help="NAME=COLUMN: the data set column of the policy's camera NAME; repeat."
    ),
]
StateColumnOption = Annotated[
    str, typer.Option(help="Data set column of the state; empty for a policy without one.")
]
SettingOption = Annotated[
    str,
    typer.Option(
        "--setting",
        help="float, w<mean bits> (w4), w<bits>-rtn (uniform); with a8 8-bit activations (w8a8). "
        "A planned one may name its allocation: -alg1, -staged, -gates, -layer, -module, -uniform, "
        "-set<widths> (w8-set0.8).",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of every random draw.")]
WeightsOption = Annotated[
    Literal["packed", "unpacked"],
    typer.Option(help="packed: compute with stored codes; unpacked: float32 in memory, faster."),
]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads; default one a core.")]
DeviceOption = Annotated[
    Literal["auto", "cpu", "cuda"],
    typer.Option("--device", help="Where to compute; auto takes a GPU if there is one."),
]
BatchSizeOption = Annotated[
    int, typer.Option("--batch-size", min=1, help="Observations that run together.")
]
MaxMemoryOption = Annotated[
    float | None,
    typer.Option(
        "--max-memory-gb",
        help="Bound of what a process takes above the interpreter, in 10^9 bytes. Layers go in "
        "groups; first-order methods and moments also read weights that do not fit from disk, "
        "stage by stage. Default: none.",
    ),
]
WaitOption = Annotated[
    float,
    typer.Option("--wait-minutes", help="Under torchrun: how long to wait for other processes."),
]
WorkersOption = Annotated[int, typer.Option("--workers", help="Processes, one a core.")]


def open_dataset(
    root: Path | None, cameras: list[str] | None, state_column: str
) -> "LeRobotDataset | None":
    """Open a LeRobot data set under the policy's own camera names; None for the simulator.

    Raises:
        QvlaError: a camera is not of the form NAME=COLUMN, or the data set lacks a column.
    """
    if root is None:
        return None
    from calibration.sources.lerobot import KeyMap, LeRobotDataset

    pairs = [text.partition("=") for text in cameras or ()]
    if bad := [name for name, _, column in pairs if not name or not column]:
        raise QvlaError(
            f"--camera takes NAME=COLUMN, such as full_image=observation.images.front, got {bad}"
        )
    columns = {name: column for name, _, column in pairs}
    return LeRobotDataset(root, KeyMap(columns, state_column or None))


def open_checkpoint(
    place: Path, unnorm_key: str | None, preset: str | None, resident: bool = True
) -> "Policy":
    """Load a checkpoint folder on the host; `resident` False leaves its weights on disk.

    Raises:
        QvlaError: it is no checkpoint.
    """
    from qvla_export.policies.families import open_policy

    kind = PolicySource(str(place)).kind
    if kind != "checkpoint":
        raise QvlaError(f"{place} must be a checkpoint folder, it is a {kind}")
    return open_policy(place, unnorm_key, preset, resident)
