"""What `qvla verify` says of an engine, for a terminal."""

from collections.abc import Iterator, Mapping

from engines.drift import ActionDrift
from qvla_export.pipeline.verify import VerificationReport
from qvla_export.shared.tables.text_table import TextTable


def verification_texts(report: VerificationReport) -> Iterator[str | TextTable]:
    """Yield how far an engine is from what it is judged by, in all and by action dimension."""
    verdict = report.verdict
    engine = verdict.engine
    yield (
        f"{engine.runtime} ({engine.target}) against {verdict.against}, "
        f"{verdict.drift.observations} {verdict.observations} observations"
    )
    rows = {
        "engine": ("engine against its reference", verdict.drift),
        "action": ("engine against full precision", verdict.action_error),
        "plan": ("its reference against full precision", verdict.plan_error),
        "floor": ("float engine against torch", verdict.float_floor),
    }
    drifts = {name: drift for name, (_, drift) in rows.items() if drift is not None}
    for name, drift in drifts.items():
        yield f"{name}: {rows[name][0]}: cosine {drift.cosine:.7f}, RMS {drift.rms:.1e}"
    yield _dimensions(drifts)
    if verdict.actions.shape[1] > 1:
        other = "the reference" if verdict.action_error is None else "full precision"
        yield f"within a chunk: {verdict.motion.against(verdict.reference_motion, other)}"
    if report.latency is not None:
        total = report.latency["summary_ms"]["total"]
        p99 = total["p99"]
        worst = f"max {total['max']:.2f} ms" if p99 is None else f"p99 {p99:.2f} ms"
        yield f"latency on {engine.runtime}: p50 {total['p50']:.2f} ms, {worst}"
    if verdict.passed:
        yield f"verified: within {verdict.thresholds.reason}"


def _dimensions(drifts: Mapping[str, ActionDrift]) -> TextTable:
    title = "|difference| of normalized actions (range 2) and in the robot's units"
    columns = ("", "dimension", "max", "mean", "max, units", "mean, units")
    return TextTable(columns, title=title).with_rows(
        (name if index == 0 else "", str(index), *(f"{figure:.1e}" for figure in figures))
        for name, drift in drifts.items()
        for index, figures in enumerate(
            zip(
                drift.max_normalized,
                drift.mean_normalized,
                drift.max_physical,
                drift.mean_physical,
                strict=True,
            )
        )
    )
