"""The step that compares the bytes a plan promises with those of graph and engine."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvla_export.pipeline.build import engines_or_why_not
from qvla_export.pipeline.progress import OnProgress, ignore
from qvla_export.shared.artifacts import versions, write_json
from qvla_export.shared.tables.text_table import TextTable, megabytes

if TYPE_CHECKING:
    from engines.trt.sizes import BundleSizes

_FORMAT = "qvla.sizes/1"


@dataclass(frozen=True)
class SizesReport:
    """Bytes of several bundles."""

    bundles: "tuple[BundleSizes, ...]"

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values, with the versions that made it."""
        bundles = [sizes.to_json() for sizes in self.bundles]
        return {"format": _FORMAT, "bundles": bundles, "versions": versions()}

    def save(self, path: Path) -> None:
        """Write JSON, atomically."""
        write_json(path, self.to_json())

    def texts(self) -> Iterator[str | TextTable]:
        """Yield a table of the bundles, then why an engine is missing, for a terminal."""
        columns = ("bundle", "target", "plan", "graph", "engine", "off", "engine file", "/ FP16")
        yield TextTable(columns, title="weights, MB (1e6 bytes)", words=("target",)).with_rows(
            _cells(bundle) for bundle in self.bundles
        )
        for bundle in self.bundles:
            if bundle.engine_missing:
                yield f"{bundle.name}: no engine: {bundle.engine_missing}"
            if bundle.forms:
                yield "\n".join((f"{bundle.name}: in memory here, see qvla tune", *bundle.forms))


def _cells(bundle: "BundleSizes") -> tuple[str, ...]:
    error = bundle.engine_error
    return (
        bundle.name,
        bundle.target,
        megabytes(bundle.planned_bytes),
        megabytes(bundle.onnx_bytes),
        megabytes(bundle.engine_weight_bytes),
        "" if error is None else f"{error:+.1%}",
        megabytes(bundle.engine_bytes),
        f"{bundle.ratio:.3f}",
    )


def compare_sizes(bundles: Sequence[Path], on_progress: OnProgress = ignore) -> SizesReport:
    """Measure the bytes of bundles: what their plans promise, their graphs and their engines.

    Engines are built if they are not there and can be built on this machine.

    Raises:
        ArtifactError: a bundle is missing or damaged.
    """
    from engines.forms.tuning import find_any_tuning
    from engines.trt.sizes import measure_sizes
    from qvla_export.shared.bundle import Bundle

    found = []
    for path in bundles:
        bundle = Bundle.load(path)
        sizes = measure_sizes(bundle, *engines_or_why_not(bundle, on_progress))
        tuning = find_any_tuning(bundle)
        found.append(sizes if tuning is None else replace(sizes, forms=tuning.lines))
    return SizesReport(tuple(found))
