"""The page's words and numbers: the sentence, the comparison table, the smaller tables."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from qvla_export.report.cells import NONE, Cell, Table
from qvla_export.report.measured import Latency, Share
from qvla_export.report.motion import motion_table
from qvla_export.report.run_data import RunData, SettingResult
from qvla_export.shared.latency_statistics import PERCENTS, jitter, percentile_text, tail
from qvla_export.shared.target import WIDTHS

_COLUMNS = (
    "Setting",
    "Mean bits",
    "Quantized layers",
    "Bundle",
    "Action error",
    "KL of tokens",
    "Solved episodes",
    "Latency",
    "Latency ratio",
)


def comparison(data: RunData) -> Table:
    """Return the table of all settings, without columns that no setting has a value in."""
    rows = [_setting_row(setting, data) for setting in data.settings]
    filled = [i for i in range(len(_COLUMNS)) if any(row[i].text != NONE for row in rows)]
    return Table(
        tuple(_COLUMNS[i] for i in filled), tuple(tuple(row[i] for i in filled) for row in rows)
    )


def summary(data: RunData) -> str:
    """Return one sentence about the recommended setting, or the smallest planned one."""
    planned = [s for s in data.settings if s.measured_widths] or [
        s for s in data.settings if s.plan is not None
    ]
    if not planned:
        return "Only the float policy is in this run folder; nothing is quantized yet."
    chosen = min(planned, key=lambda setting: setting.layer_bytes)
    if data.recommendation is not None:
        name = data.recommendation.setting
        chosen = next((s for s in data.settings if s.plan and s.name == name), chosen)
    assert chosen.plan is not None
    share = chosen.layer_bytes / data.float16_bytes
    clauses = [
        f"At {chosen.plan.mean_bits_per_channel:.2f} mean bits per channel ({chosen.name}) the "
        f"quantized layers take {_percent(share)} of their float16 bytes"
    ]
    reference = data.float_setting
    if chosen.rollouts is not None:
        solved = chosen.rollouts.success
        text = f"the policy solves {_percent(solved.value)} of {solved.episodes} episodes"
        if reference is not None and reference.rollouts is not None:
            text += f" (float: {_percent(reference.rollouts.success.value)})"
        clauses.append(text)
    if chosen.action_error is not None:
        clauses.append(_error_clause(chosen, data))
    return _joined(clauses) + "."


def controls(data: RunData) -> Table:
    """Return the controls' success; empty rows where none were run."""
    rows = tuple(
        (
            Cell(name, rollouts.policy),
            _success(rollouts.success),
            Cell(", ".join(rollouts.by_task)),
        )
        for name, rollouts in data.controls.items()
    )
    return Table(("Control", "Solved episodes", "Tasks"), rows)


def dimensions(data: RunData) -> Table:
    """Return the action error of every action dimension."""
    errors = [(s.name, s.action_error) for s in data.settings if s.action_error is not None]
    count = max((len(e.mean_abs_physical) for _, e in errors), default=0)
    rows = tuple(
        (Cell(name), Cell(kind), *(Cell(f"{v:.3g}") for v in values))
        for name, e in errors
        for kind, values in (
            ("mean, physical", e.mean_abs_physical),
            ("mean, normalized", e.mean_abs_normalized),
            ("largest, normalized", e.max_abs_normalized),
        )
    )
    names = tuple(f"Dimension {i}" for i in range(count))
    if data.recommendation is not None and len(data.recommendation.names) == count:
        names = data.recommendation.names
    return Table(("Setting", "|ΔA|", *names), rows)


def tasks(data: RunData) -> Table:
    """Return the success of every task and setting."""
    judged = [(s.name, s.rollouts) for s in data.settings if s.rollouts is not None]
    names = list(dict.fromkeys(task for _, rollouts in judged for task in rollouts.by_task))
    rows = tuple(
        (Cell(task), *(_success(rollouts.by_task.get(task)) for _, rollouts in judged))
        for task in names
    )
    return Table(("Task", *(name for name, _ in judged)), rows)


def motion(data: RunData) -> Table:
    """Return how the robot moved under every setting, and its error where it went."""
    moved = {s.name: s.rollouts.motion for s in data.settings if s.rollouts is not None}
    errors = {s.name: s.action_error.mse for s in data.settings if s.action_error is not None}
    return motion_table(moved, errors)


def plans(data: RunData) -> Table:
    """Return channels by width, budget, and the predicted beside the measured error."""
    rows = []
    for setting in data.settings:
        if setting.plan is None:
            continue
        counts = setting.plan.histogram()
        expected = setting.plan.expected_error
        error = setting.action_error
        rows.append(
            (
                Cell(setting.name, setting.plan.budget),
                *(Cell(f"{counts[bits]:,}") for bits in WIDTHS),
                Cell(NONE if expected is None else f"{expected:.3g}"),
                Cell(NONE if error is None else f"{error.mse:.3g}"),
                Cell(f"{error.mse / expected:.3g}×" if error and expected else NONE),
            )
        )
    widths = (f"{bits} bits" for bits in WIDTHS)
    return Table(
        ("Plan", *widths, "Predicted ‖ΔA‖²", "Measured ‖ΔA‖²", "Measured / predicted"), tuple(rows)
    )


def latencies(data: RunData) -> Table:
    """Return percentiles, jitter and, where a deadline was stated, misses of every span."""
    profiles = {s.name: s.latency for s in data.settings if s.latency is not None}
    found = {**profiles, **data.other_latencies}
    deadline = next((latency.deadline for latency in found.values()), None)
    late = () if deadline is None else (f"Later than {deadline.ms:.1f} ms",)
    rows = tuple(
        (Cell(name, _starts(latency)), *_span_cells(latency, span))
        for name, latency in found.items()
        for span in latency.samples_ms
    )
    percents = (f"p{percent:g}" for percent in PERCENTS)
    jitters = ("p99 − p50", "From one to the next")
    columns = ("Profile", "Span, ms", *percents, "Largest", *jitters, "Actions", *late)
    return Table(columns, rows)


def _starts(latency: Latency) -> str:
    loaded = "" if latency.load_ms is None else f"loaded in {latency.load_ms:.0f} ms, "
    held = latency.resident_bytes
    memory = "" if held is None else f", {held / 1e6:.0f} MB resident"
    return f"{latency.transport}; {loaded}first action {latency.first_action_ms:.1f} ms{memory}"


def _span_cells(latency: Latency, span: str) -> Iterator[Cell]:
    samples, deadline = latency.samples_ms[span], latency.deadline
    yield Cell(span)
    for percent in PERCENTS:
        yield Cell(percentile_text(samples, percent, 3))
    yield Cell(f"{samples.max():.3f}")
    found = jitter(samples)
    for ms in (found.spread_ms, found.step_ms):
        yield Cell(NONE if ms is None else f"{ms:.3f}")
    yield Cell(str(len(samples)))
    if deadline is not None:
        misses = deadline.misses(samples)
        yield Cell(f"{misses.count} ({100 * misses.share:.1f} %)" if span == "total" else "")


def _setting_row(setting: SettingResult, data: RunData) -> tuple[Cell, ...]:
    return (
        Cell(setting.name, _budget(setting)),
        _mean_bits(setting, data),
        Cell(
            f"{100 * setting.layer_bytes / data.float16_bytes:.1f} % of FP16",
            f"{setting.layer_bytes:,} bytes",
        ),
        Cell(f"{setting.bundle_bytes / 1e6:.2f} MB", f"{setting.bundle_bytes:,} bytes"),
        _error(setting),
        _divergence(setting),
        _success(setting.rollouts.success if setting.rollouts else None),
        _latency(setting.latency),
        _ratio(setting.latency),
    )


def _budget(setting: SettingResult) -> str:
    if setting.plan is None:
        return "not quantized"
    if setting.measured_widths:
        return setting.plan.budget
    return f"{setting.plan.budget}, round to nearest"


def _mean_bits(setting: SettingResult, data: RunData) -> Cell:
    stored = 16 * setting.layer_bytes / data.float16_bytes
    if setting.plan is None:
        return Cell("float", f"stored {stored:.2f} per weight")
    plan = setting.plan
    return Cell(
        f"{plan.mean_bits_per_channel:.2f} per channel",
        f"{plan.mean_bits_per_weight:.2f} per weight, stored {stored:.2f}",
    )


def _error(setting: SettingResult) -> Cell:
    error = setting.action_error
    if error is None:
        return Cell(NONE)
    drift = f"engine drift {error.engine_drift_max:.1e}"
    return Cell(f"{error.rms:.3g} RMS", f"‖ΔA‖² {error.mse:.3g}, n\u00a0{error.held_out}; {drift}")


def _divergence(setting: SettingResult) -> Cell:
    error = setting.action_error
    if error is None or error.token_kl is None:
        return Cell(NONE)
    return Cell(f"{error.token_kl:.3g} nats", "of all tokens of an action")


def _success(share: Share | None) -> Cell:
    if share is None:
        return Cell(NONE)
    interval = f"[{100 * share.low:.1f}, {100 * share.high:.1f}]"
    return Cell(f"{100 * share.value:.1f} %", f"{interval}, n\u00a0{share.episodes}")


def _latency(latency: Latency | None) -> Cell:
    if latency is None:
        return Cell(NONE)
    return Cell(
        f"{latency.percentile(50):.2f} ms",
        _worst(latency.samples_ms["total"]),
    )


def _worst(total_ms: NDArray[np.float64]) -> str:
    name, ms = tail(total_ms)
    return f"{name}\u00a0{ms:.2f}\u00a0ms, n\u00a0{len(total_ms)}"


def _ratio(latency: Latency | None) -> Cell:
    if latency is None:
        return Cell(NONE)
    ratio = latency.ratio
    if ratio is None:
        return Cell("1", "baseline")
    return Cell(f"{ratio.value:.2f}×", f"[{ratio.low:.2f}, {ratio.high:.2f}] of {ratio.baseline}")


def _error_clause(chosen: SettingResult, data: RunData) -> str:
    assert chosen.action_error is not None
    text = f"its action error is {chosen.action_error.rms:.3g} RMS"
    # Only round-to-nearest at the same bits is a fair rival.
    rival = next((s for s in data.settings if s.name == f"{chosen.name}-rtn"), None)
    if rival is None or rival.action_error is None or rival.action_error.rms == 0:
        return text
    times = chosen.action_error.rms / rival.action_error.rms
    return f"{text}, {times:.2f}× that of round-to-nearest ({rival.name})"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\u00a0%"


def _joined(clauses: Sequence[str]) -> str:
    if len(clauses) == 1:
        return clauses[0]
    return ", ".join(clauses[:-1]) + ", and " + clauses[-1]
