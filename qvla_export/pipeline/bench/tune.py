"""The step that finds the form in which each bundle runs fastest on this machine."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvla_export.pipeline.progress import OnProgress, bar, ignore
from qvla_export.shared.artifacts import versions, write_json
from qvla_export.shared.errors import QvlaError

if TYPE_CHECKING:
    from engines.forms.tune import TuningReport, TuningSettings
    from engines.rounds import Ratio
    from qvla_export.shared.bundle import Bundle

_FORMAT = "qvla.tuning-report/1"


@dataclass(frozen=True)
class TunedBundle:
    """What came of one bundle."""

    name: str
    report: "TuningReport"
    # How many times as fast as the float bundle, both as tuned; None without one.
    speedup: "Ratio | None" = None
    # Bounds that `recommended` is by.
    byte_share: float = 0.6

    @property
    def share(self) -> float | None:
        """Bytes of constants in memory against the float policy's; None where none runs."""
        tuning = self.report.tuning
        return None if tuning is None else tuning.resident_bytes / self.report.float_bytes

    @property
    def recommended(self) -> bool | None:
        """Whether it is not slower than float within the bound; None where float was not timed."""
        if self.share is None or self.speedup is None:
            return None
        return self.speedup.median >= 1 and self.share <= self.byte_share

    @property
    def lines(self) -> tuple[str, ...]:
        """Every form in words, then the choice."""
        total = self.report.float_bytes
        found = [f"{self.name}: float holds {total / 1e6:.2f} MB of weights in memory"]
        found += [f"  {trial.timed.text(total)}" for trial in self.report.trials]
        tuning = self.report.tuning
        if tuning is None:
            return (*found, "  -> no form may be taken; weights run as stored")
        text = f"  -> {tuning.form}"
        if self.speedup is not None:
            text += f"; {self.speedup} times as fast as float"
        advice = {True: ", recommended here", False: ", not recommended here", None: ""}
        return (*found, text + advice[self.recommended])

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        ratio = self.speedup
        return {
            "bundle": self.name,
            **self.report.to_json(),
            "resident_share": self.share,
            "speedup": None if ratio is None else [ratio.median, ratio.low, ratio.high],
            "recommended": self.recommended,
        }


@dataclass(frozen=True)
class TuneReport:
    """What came of several bundles."""

    bundles: tuple[TunedBundle, ...]
    settings: "TuningSettings"
    versions: dict[str, str] = field(default_factory=versions)

    def lines(self) -> Iterator[str]:
        """Yield what a terminal is told."""
        for bundle in self.bundles:
            yield from bundle.lines

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values, with how it was measured."""
        own = self.settings
        return {
            "format": _FORMAT,
            "threads": own.threads,
            "rounds": own.rounds,
            "clock": own.clock,
            "byte_share": own.byte_share,
            "bundles": [bundle.to_json() for bundle in self.bundles],
            "versions": self.versions,
        }


def tune_bundles(
    paths: Sequence[Path],
    settings: "TuningSettings",
    output: Path | None = None,
    on_progress: OnProgress = ignore,
) -> TuneReport:
    """Time every form of some bundles, write each one's choice beside it, compare with float.

    Args:
        paths: bundles of target `cpu`; the first float one is what the others are compared with.
        settings: how.
        output: JSON report to write; None writes none.
        on_progress: hears of every round.

    Raises:
        EngineError: a bundle is for another target.
        ArtifactError: a bundle is missing or damaged.
    """
    from engines.forms.tune import tune
    from engines.forms.tuning import tuning_path
    from qvla_export.shared.bundle import Bundle

    bundles = {_name(path): Bundle.load(path) for path in paths}
    if len(bundles) != len(paths):
        raise QvlaError(f"bundles to tune need names of their own, got {list(map(_name, paths))}")
    reports = {}
    for name, bundle in bundles.items():
        reports[name] = tune(bundle, settings, bar(on_progress, f"{name}: rounds"))
        path, tuning = tuning_path(bundle), reports[name].tuning
        if tuning is None:
            path.unlink(missing_ok=True)
        else:
            tuning.save(path)
    ratios = _speedups(bundles, reports, settings, on_progress)
    found = TuneReport(
        tuple(
            TunedBundle(name, report, ratios.get(name), settings.byte_share)
            for name, report in reports.items()
        ),
        settings,
    )
    if output is not None:
        write_json(output, found.to_json())
    return found


def _name(path: Path) -> str:
    """Return a bundle's name: settings/w4/bundle is known by its setting."""
    whole = path.absolute()
    return whole.parent.name if whole.name == "bundle" else whole.name


def _speedups(
    bundles: "dict[str, Bundle]",
    reports: "dict[str, TuningReport]",
    settings: "TuningSettings",
    on_progress: OnProgress,
) -> "dict[str, Ratio]":
    """Time the forms that were chosen in turn, where one of them is float."""
    from engines.load import load_engine
    from engines.rounds import speedup, time_in_turn

    names = [name for name, report in reports.items() if report.tuning is not None]
    baseline = next((name for name in names if bundles[name].plan is None), None)
    if baseline is None or len(names) < 2:
        return {}
    with ExitStack() as stack:
        calls = {}
        for name in names:
            bundle = bundles[name]
            engine = stack.enter_context(load_engine(bundle, settings.threads, "tuned"))
            feeds = bundle.golden().feeds[0]
            calls[name] = lambda engine=engine, feeds=feeds: engine.infer(feeds)
        report = bar(on_progress, "as tuned: rounds")
        samples = time_in_turn(calls, settings.rounds, report, settings.clock)
    others = {name: own for name, own in samples.items() if name != baseline}
    return {name: speedup(own, samples[baseline]) for name, own in others.items()}
