"""`write_report`: run folder -> report.html, one page without any outside resource."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from qvla_export.report import (
    estimators,
    figures,
    kept_layers,
    predicted_errors,
    recommendation,
    result_figures,
    robots,
    tables,
)
from qvla_export.report.missing import missing_artifacts
from qvla_export.report.run_data import RunData, read_run
from qvla_export.report.svg import style
from qvla_export.report.traces import draw_traces
from qvla_export.shared.artifacts import write_bytes

REPORT = "report.html"


@dataclass(frozen=True)
class Drawing:
    """One figure of the page."""

    # Of the section it belongs to; the template asks for it.
    section: str
    title: str
    # What it shows and on what it was measured.
    caption: str
    # What somebody who cannot see it needs to know.
    alt: str
    svg: Markup


def write_report(run: Path) -> Path:
    """Write `report.html` into a run folder, whole or not at all; equal runs give equal bytes.

    Raises:
        ArtifactError: a required artifact is missing, or one is damaged.
        ArtifactMismatch: two artifacts do not belong together.
    """
    path = run / REPORT
    write_bytes(path, render(read_run(run)).encode("utf-8", "replace"))
    return path


def render(data: RunData) -> str:
    """Return the page."""
    environment = Environment(
        loader=PackageLoader("qvla_export.report", ""),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    with style():
        drawings = list(_drawings(data))
    return environment.get_template("report.html.j2").render(
        data=data,
        contents=_contents(data),
        summary=tables.summary(data),
        open_loop=data.recommendation and recommendation.open_loop_table(data.recommendation),
        comparison=tables.comparison(data),
        controls=tables.controls(data),
        dimensions=tables.dimensions(data),
        tasks=tables.tasks(data),
        plans=tables.plans(data),
        predicted_errors=predicted_errors.predicted_table(
            {s.name: s.predicted_error for s in data.settings if s.predicted_error is not None},
            {s.name: s.action_error for s in data.settings if s.action_error is not None},
        ),
        motion=tables.motion(data),
        latencies=tables.latencies(data),
        robots=robots.robot_table(data.robots),
        estimators=estimators.estimator_table(data.estimators),
        estimators_caption=data.estimators and estimators.estimator_caption(data.estimators),
        standard_errors=estimators.standard_error_table(data.sensitivities),
        kept_layers=kept_layers.kept_table(data.kept_layers),
        kept_caption=data.kept_layers and kept_layers.kept_caption(data),
        drawings=drawings,
        missing=missing_artifacts(data),
    )


def _contents(data: RunData) -> dict[str, str]:
    """Return the page's sections: anchor -> heading."""
    sections = {
        "recommendation": "Recommendation",
        "comparison": "Float against quantized",
        "results": "What comes out",
        "sensitivities": "What the channels do to the action",
        "widths": "Widths",
        "reading": "Reading this page",
    }
    if data.recommendation is None:
        del sections["recommendation"]
    return sections


def _drawings(data: RunData) -> Iterator[Drawing]:
    """Yield the figures that the run has data for, in the page's order."""
    yield from _trace_drawings(data)
    yield from _result_drawings(data)
    measured = data.sensitivities
    origin = f"{measured.method}, {measured.samples} observations"
    yield _drawing(
        "sensitivities",
        "Sensitivity of modules",
        f"Expected squared deviation of the normalized action chunk if all channels of one module "
        f"had one width: the sum over its channels ({origin}).",
        "Dot plot; one row a module, one dot a width.",
        lambda: figures.draw_modules(measured),
    )
    yield _drawing(
        "sensitivities",
        "Sensitivity of channels",
        f"Every channel's sensitivity, most sensitive first ({origin}). Steep ends are the few "
        "channels that need many bits.",
        "Falling curves over the share of channels; upper by width, lower by module.",
        lambda: figures.draw_channels(measured),
    )
    agreement = data.agreement
    if agreement is not None:
        share = agreement.first_order_seconds / agreement.exact_all_seconds
        yield _drawing(
            "agreement",
            "First order against exact",
            f"Ranks of {len(agreement.bits)} randomly drawn (channel, width) pairs on "
            f"{agreement.samples} observations. Measuring all pairs takes {100 * share:.2f} % of "
            f"the time that exact measurement would ({agreement.first_order_seconds:.0f} s "
            f"against {agreement.exact_all_seconds:.0f} s; scaled from one batch and from these "
            "pairs).",
            f"Scatter along the diagonal; Spearman rank correlation {agreement.spearman:.3f}.",
            lambda: figures.draw_agreement(agreement),
        )
    yield from _plan_drawings(data)


def _trace_drawings(data: RunData) -> Iterator[Drawing]:
    found = data.recommendation
    if found is None:
        return
    quantized = [s.name for s in data.settings if s.plan is not None]
    # The recommended one first, then the smallest.
    sizes = {s.name: s.layer_bytes for s in data.settings}
    quantized.sort(key=lambda name: (name != found.setting, sizes[name]))
    yield _drawing(
        "traces",
        "Action traces",
        "Every step of the chunk on some of the held-out observations: what was demonstrated, what "
        f"the float policy does and what quantized ones do. {found.named_by}.",
        f"One row for each number of the action: {', '.join(found.names)}.",
        lambda: draw_traces(found.traces, quantized, result_figures.looks_of(data)),
    )


def _result_drawings(data: RunData) -> Iterator[Drawing]:
    judged = [s for s in data.settings if s.rollouts is not None]
    if judged or any(s.plan is not None and s.action_error is not None for s in data.settings):
        yield _drawing(
            "trade-off",
            "Size, error and success",
            f"Action error on held-out observations{' and closed-loop success' * bool(judged)} "
            "against the stored bytes of the quantized layers. The float engine, exact up to its "
            "drift, has no place on the logarithmic axis.",
            "Scatter plots over size. Values: the table.",
            lambda: result_figures.draw_trade_off(data, data.settings),
        )
    if judged:
        yield _drawing(
            "success",
            "Success by task",
            "Share of solved episodes; every setting meets the same scenes. Bars are Wilson 95 % "
            "intervals.",
            "Dots with intervals, one row a task; values are in the table of tasks.",
            lambda: result_figures.draw_success(data, judged),
        )
    deviating = [s for s in judged if s.rollouts is not None and s.rollouts.cumulative.size]
    if deviating:
        yield _drawing(
            "deviation",
            "Error over time",
            "Running sum of the squared action deviation from the float policy on the same "
            "observations along closed-loop episodes; mean and its 95 % band. An episode that has "
            "ended keeps its sum; an exact engine has none to show.",
            "Rising curves over decisions, one a setting.",
            lambda: result_figures.draw_deviation(data, deviating),
        )
    timed = [s for s in data.settings if s.latency is not None]
    if timed:
        yield _drawing(
            "latency",
            "Latency",
            f"Every measured action, settings taken in turn in one run, on {data.info.target}. "
            "Above the cumulative distribution, below the spans' medians.",
            "Step curves of the total latency and stacked bars of the spans' medians.",
            lambda: result_figures.draw_latency(data, timed),
        )


def _plan_drawings(data: RunData) -> Iterator[Drawing]:
    made = {s.name: s.plan for s in data.settings if s.plan is not None}
    if not made:
        return
    yield _drawing(
        "plans",
        "Widths of all channels",
        "How many channels each plan gives each width. Channels of 0 bits are absent from the "
        "graph.",
        "Stacked bars, one a plan; values are in the table of plans.",
        lambda: figures.draw_width_shares(made),
    )
    for index, (name, plan) in enumerate(made.items()):
        # A uniform plan is one colour; the figure above says which.
        if sum(count > 0 for count in plan.histogram().values()) > 1:
            yield _drawing(
                "layers",
                f"Widths per layer: {name}",
                f"Layers in forward order; budget: {plan.budget}.",
                "Stacked bars, one row a layer.",
                lambda plan=plan, index=index: figures.draw_layer_widths(plan, index),  # type: ignore[misc]  # defaults bind the loop's values
            )


def _drawing(section: str, title: str, caption: str, alt: str, draw: Callable[[], str]) -> Drawing:
    # The only markup that is not escaped: made by matplotlib, which escapes the names in it.
    return Drawing(section, title, caption, alt, Markup(draw()))
