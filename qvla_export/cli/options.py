"""Options that several commands share, with their units and defaults; paths that must exist.

Only light modules are imported here: what is missing is refused before torch, onnx or numpy load.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from qvla_export.pipeline.data_source import ColumnOptions
from qvla_export.pipeline.recommend.tolerance import Tolerance
from qvla_export.pipeline.sizing.holding import HoldingOptions
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.field_parameters import with_fields
from qvla_export.shared.target import ScaleForm, WeightForm


@dataclass(frozen=True)
class Existing:
    """What a path must be the place of; its `require` is a `callback` of typer's."""

    # "checkpoint folder", and what to do where there is none.
    what: str
    remedy: str
    # What may stand there instead of a path.
    words: tuple[str, ...] = ()
    urls: bool = False

    def require(self, value: Any) -> Any:
        """Return an option's path or paths as they are, while options are read.

        Raises:
            QvlaError: one of them is not there.
        """
        for place in value if isinstance(value, list | tuple) else [value]:
            if place is None or place in self.words or self._is_url(place):
                continue
            if not Path(place).exists():
                raise QvlaError(f"{self.what} not found: {place}; {self.remedy}")
        return value

    def _is_url(self, place: object) -> bool:
        return self.urls and str(place).startswith(("http://", "https://"))


_CHECK = "check the path"
A_RUN = Existing("run folder", "make it first with: qvla calibrate")
A_CHECKPOINT = Existing("checkpoint folder", "check --policy")
A_BUNDLE = Existing("bundle folder", "make it first with: qvla export, or qvla deploy")
A_DATASET = Existing("data set", _CHECK)
A_RECORDING = Existing(
    "MCAP file", "record it first with: qvla serve --record, or qvla run --record"
)
SOME_RATES = Existing("file of rates", "measure them first with: qvla bench rates")
A_LATENCY = Existing("file of latencies", "measure them first with: qvla profile")
A_FILE = Existing("file", _CHECK)
A_CALIBRATION = Existing("calibration set", "make it first with: qvla calibrate")
AN_EVALUATION = Existing("evaluation", "make it first with: qvla evaluate")
A_POLICY = Existing("checkpoint folder, bundle folder or URL of a server", _CHECK, urls=True)
A_GRAPH = Existing("bundle folder or .onnx file", "make a bundle first with: qvla export")
A_BUNDLE_OR_SERVER = replace(A_BUNDLE, urls=True)


def local_dataset(place: Path | None) -> Path | None:
    """Return the folder of a data set, one of the Hub's in the local cache too.

    Raises:
        QvlaError: it is not there.
    """
    from calibration.sources.hub_cache import find_dataset

    folder: Path | None = A_DATASET.require(None if place is None else find_dataset(Path(place)))
    return folder


# Under torchrun only --run-folder can be written: it takes --run for one of its own.
RunOption = Annotated[
    Path,
    typer.Option(
        "--run", "--run-folder", help="Run folder, one artifact a stage.", callback=A_RUN.require
    ),
]
NewRunOption = Annotated[
    Path,
    typer.Option("--run", "--run-folder", help="Run folder; an existing one continues."),
]
PlanOnlyOption = Annotated[bool, typer.Option("--plan-only", help="Foretell costs; write nothing.")]
ForceOption = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Replace finished work of more than 60 CPU seconds where an option has changed; "
        "without it that is refused, and cheaper work is replaced and named.",
    ),
]
PolicyOption = Annotated[
    Path,
    typer.Option(
        "--policy",
        help="Checkpoint folder, as it was published.",
        callback=A_CHECKPOINT.require,
    ),
]
BundleArgument = Annotated[Path, typer.Argument(help="Bundle folder.", callback=A_BUNDLE.require)]
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
_SCALES = (
    "Of 2- and 4-bit weights. group: one for every 64 inputs. two-level: one a channel, groups "
    "have whole multiples of it, so that every code expands to 8 bits (which TensorRT's targets "
    "then store)."
)
ScalesOption = Annotated[
    ScaleForm,
    typer.Option("--scales", help=_SCALES),
]
UsualScalesOption = Annotated[
    ScaleForm | None,
    typer.Option(
        "--scales",
        help=f"{_SCALES} Default: two-level on target cpu where settings round inputs (w8a8), else "
        "group.",
    ),
]
TuneCodesOption = Annotated[
    bool,
    typer.Option(
        "--tune-codes",
        help="Once all codes of a plan are made, they and their scales answer what they do to the "
        "action together: less error in the same bytes, with the whole policy in memory. "
        "Calibrate on 256 observations at least, better on 1,024.",
    ),
]
RangesOption = Annotated[
    Literal["max", "percentile", "mse", "entropy", "token"],
    typer.Option(
        "--activations-method",
        help="How the ranges of rounded activations (w8a8) are chosen. token: anew for each token "
        "in every run: a third of the error, more operations (target cpu).",
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
    typer.Option(
        "--dataset",
        help="Demonstrations of any format that is read (LeRobot, RLDS, LIBERO or ALOHA HDF5, "
        "CALVIN, a list of pictures, MCAP), or Hub id of a downloaded LeRobotDataset; without it, "
        "the simulator.",
        callback=local_dataset,
    ),
]
# One a field of `ColumnOptions`.
_COLUMNS = {
    "cameras": Annotated[
        list[str] | None,
        typer.Option(
            "--camera", help="NAME=COLUMN: the data set column of the policy's camera NAME; repeat."
        ),
    ],
    "state_column": Annotated[
        str,
        typer.Option(
            help="Data set column of the state, or several separated by commas; empty for a policy "
            "without one."
        ),
    ],
    "action_column": Annotated[
        str,
        typer.Option(
            help="Data set column of the action, or several separated by commas; empty for a data "
            "set without one, which calibration does not need."
        ),
    ],
    "instruction_column": Annotated[
        str | None,
        typer.Option(help="Data set column of instructions; else the task that a row names."),
    ],
    "instruction": Annotated[
        str | None,
        typer.Option(help="What to do in every frame, for recordings that do not say."),
    ],
}


# One a field of `Tolerance`.
_TOLERANCES = {
    "tolerance_mm": Annotated[
        float | None,
        typer.Option(
            help="Most that a translation may be off float's in nine actions of ten, mm; default: "
            "a tenth of the float policy's own median error against the demonstrations."
        ),
    ],
    "tolerance_deg": Annotated[
        float | None, typer.Option(help="The same of rotations and joints, degrees.")
    ],
    "tolerance_gripper": Annotated[
        float | None, typer.Option(help="The same of a gripper, in its own units.")
    ],
    "action_names": Annotated[
        str | None,
        typer.Option(help="x,y,z,roll,pitch,yaw,gripper; default: the checkpoint's, the data's."),
    ],
    "unit_mm": Annotated[
        float | None, typer.Option(help="Millimetres of one unit of a translation: 1000 for m.")
    ],
    "unit_deg": Annotated[
        float | None, typer.Option(help="Degrees of one unit of a rotation: 57.2958 for radians.")
    ],
}


def with_columns(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command with the options of `ColumnOptions` in place of its parameter `columns`."""
    return with_fields(command, "columns", ColumnOptions, _COLUMNS)


def with_tolerance(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command with the options of `Tolerance` in place of its parameter `tolerance`."""
    return with_fields(command, "tolerance", Tolerance, _TOLERANCES)


def with_holding(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command with the options of `HoldingOptions` in place of its parameter `options`."""
    batch = typer.Option(min=1, help="Observations that run together. Default: 8, or as fit.")
    singles = {
        "device": DeviceOption,
        "max_memory_gb": MaxMemoryOption,
        "batch_size": Annotated[int | None, batch],
        "layers_per_part": LayersPerPartOption,
    }
    return with_fields(command, "options", HoldingOptions, singles)


SkipBadFramesOption = Annotated[
    bool,
    typer.Option(
        "--skip-bad-frames",
        help="Leave out and count frames whose state is not finite or whose instruction is empty.",
    ),
]
TasksOption = Annotated[
    str | None,
    typer.Option(
        "--tasks",
        help="Comma-separated task names, precise for those as object state, precise-pictures for "
        "those in pictures; the eight of large objects by default. evaluate: LIBERO's suites too.",
    ),
]
CountOption = Annotated[int, typer.Option(help="Observations to measure on.")]
HeldOutOption = Annotated[int, typer.Option(help="Observations to judge by.")]
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
    WeightForm,
    typer.Option(help="packed: stored codes; unpacked: float32 in memory; tuned: see qvla tune."),
]
ColdStartsOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        help="New processes of each bundle, from their start to the first action, and their "
        "memory; default: one.",
    ),
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
        "stage by stage. Default: none; qvla deploy: 80 % of what is free.",
    ),
]
LayersPerPartOption = Annotated[
    int | None,
    typer.Option(
        "--layers-per-part",
        min=1,
        help="Decoder blocks a part of a bundle: for a policy that does not fit into memory. "
        "Default: one graph of the whole policy.",
    ),
]
WaitOption = Annotated[
    float,
    typer.Option("--wait-minutes", help="Under torchrun: how long to wait for other processes."),
]
WorkersOption = Annotated[int, typer.Option("--workers", help="Processes, one a core.")]
QuantizerOption = Annotated[
    Literal["nearest", "compensated"] | None,
    typer.Option(
        "--quantizer",
        help="Of plans: nearest codes, or codes that make up for each other (qvla round). Default: "
        "compensated where the method is of first order, else nearest.",
    ),
]
FramesPerEpisodeOption = Annotated[
    int | None,
    typer.Option(
        "--frames-per-episode",
        min=1,
        help="Observations of one episode; cumulative sums want many. Default: 2, more where the "
        "episodes are few.",
    ),
]
ProbesOption = Annotated[
    int,
    typer.Option(
        "--probes",
        min=0,
        help="Random probes an observation; 0 takes the whole Jacobian. At 4 they made 10 to 25 % "
        "of the variance on the reference policy, which observations were drawn the rest; the "
        "command states both.",
    ),
]
ShareOption = Annotated[
    float,
    typer.Option("--exact-share", help="Of all channels: measured exactly by two-stage."),
]
RatesOption = Annotated[
    Path | None,
    typer.Option(
        "--rates",
        help="Device rates that `qvla bench rates` measured, for cpu.",
        callback=SOME_RATES.require,
    ),
]
PowerModeOption = Annotated[
    str | None,
    typer.Option("--power-mode", help="Power mode the prediction is for; the target's fastest."),
]
MaxPredictedOption = Annotated[
    float | None,
    typer.Option(
        "--max-latency-ms",
        "--max-predicted-ms",
        help="Longest predicted action, ms; needs --policy.",
    ),
]
LimitedPolicyOption = Annotated[
    Path | None,
    typer.Option(
        "--policy", help="Checkpoint, for a limit on the latency.", callback=A_CHECKPOINT.require
    ),
]
EnvironmentOption = Annotated[
    Path, typer.Option(help="Environment of the libraries: make baselines-env.")
]
JsonOption = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document on stdout, everything else on stderr."),
]
