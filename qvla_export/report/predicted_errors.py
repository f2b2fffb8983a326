"""What a plan is expected to do to the actions of other episodes, with what errors do together."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from qvla_export.report.cells import NONE, Cell, Table
from qvla_export.report.measured import ActionError, damage_named, finite, read_object

PREDICTED_ERROR = "predicted_error.json"


@dataclass(frozen=True)
class PredictedError:
    """What `qvla round --cross-validate` says of a plan."""

    plan_digest: str
    # RMS of the normalized actions' error: of all errors together, and if none met another.
    rms: float
    rms_of_channels: float
    # Squared error of all modules over the sum of each module's by itself.
    union_over_modules: float
    # Of each module over the sum of its channels' by themselves.
    union_over_channels: Mapping[str, float]


def read_predicted_error(path: Path) -> PredictedError:
    """Read what the step of cross-validation wrote, without its import of torch.

    Raises:
        ArtifactError: the file is missing or damaged.
    """
    what = "predicted error"
    value = read_object(path, what, tuple(field.name for field in fields(PredictedError)))
    with damage_named(path, what):
        return PredictedError(
            plan_digest=str(value["plan_digest"]),
            rms=float(finite(value["rms"])),
            rms_of_channels=float(finite(value["rms_of_channels"])),
            union_over_modules=float(finite(value["union_over_modules"])),
            union_over_channels={
                str(name): float(finite(ratio))
                for name, ratio in value["union_over_channels"].items()
            },
        )


def predicted_table(
    predicted: Mapping[str, PredictedError], measured: Mapping[str, ActionError]
) -> Table:
    """Return predicted beside measured errors, and union errors over the sums of their parts.

    Args:
        predicted: by setting; no rows where there are none.
        measured: action errors of the settings that have one.
    """
    modules = tuple(
        dict.fromkeys(name for error in predicted.values() for name in error.union_over_channels)
    )
    rows = []
    for name, error in predicted.items():
        own = measured.get(name)
        ratios = (error.union_over_channels.get(module) for module in modules)
        rows.append(
            (
                Cell(name),
                Cell(f"{error.rms:.3g}", f"{error.rms_of_channels:.3g} if channels did not meet"),
                Cell(NONE if own is None else f"{own.rms:.3g}"),
                Cell(f"{own.rms / error.rms:.2f}×" if own and error.rms else NONE),
                Cell(f"{error.union_over_modules:.2f}"),
                *(Cell(NONE if ratio is None else f"{ratio:.2f}") for ratio in ratios),
            )
        )
    columns = ("Plan", "Predicted RMS", "Measured RMS", "Measured / predicted", "All modules")
    return Table((*columns, *modules), tuple(rows))
