"""What a stage, or a whole deployment, says when it has ended, for a terminal."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from qvla_export.pipeline.deploy import DeploymentResult
from qvla_export.pipeline.deployment.rows import DeployedSetting
from qvla_export.pipeline.recommend.sentences import recommendation_lines
from qvla_export.sensitivity.agreement import Agreement
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.tables.text_table import TextTable


def deployment_texts(result: DeploymentResult, target: str) -> Iterator[str | TextTable]:
    """Yield what came of a deployment for a target: figures, recommendation and report."""
    compared = result.agreement
    if compared is not None:
        yield (
            f"sensitivities: Spearman {compared.spearman:.4f} with exact, at "
            f"{compared.time_ratio:.4f} of its time"
        )
    if not result.native:
        yield (
            f"this machine cannot run engines for {target}: its graphs are judged on ONNX "
            "Runtime, latency is not measured"
        )
    columns, rows = setting_cells(result.rows)
    yield TextTable(columns, tuple(rows), title="float against quantized")
    yield from recommendation_lines(result.recommendation)
    yield f"report: {result.report}"


def sensitivity_lines(
    measured: Sensitivities, path: Path, compared: Agreement | None, agreement_path: Path
) -> Iterator[str]:
    """Yield what was measured how, how certain it is, and how it agrees with exact measurement."""
    yield f"sensitivities: {_described(measured)} -> {path}"
    if measured.standard_error is not None:
        yield _standard_error(measured)
    if compared is not None:
        yield (
            f"agreement with exact: Spearman {compared.spearman:.4f} on {len(compared.pairs)} "
            f"pairs, time ratio {compared.time_ratio:.5f} -> {agreement_path}"
        )


def setting_cells(
    rows: Sequence[DeployedSetting],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the columns of the table of settings and the cells of each row.

    Divergences have a column where actions are tokens.
    """
    decodes = any(row.token_kl is not None for row in rows)
    errors = ("action RMS", "token KL") if decodes else ("action RMS",)
    columns = ("setting", "layers / FP16", "bundle", *errors, "success", "p50", "p99")
    return columns, [_cells(row, decodes) for row in rows]


def _cells(row: DeployedSetting, decodes: bool) -> tuple[str, ...]:
    divergence = "" if row.token_kl is None else f"{row.token_kl:.3g}"
    return (
        row.setting,
        f"{row.layer_ratio:.3f}",
        f"{row.bundle_bytes / 1e6:.2f} MB",
        f"{row.action_rms:.5f}",
        *([divergence] if decodes else []),
        success_text(row),
        "not run" if row.p50_ms is None else f"{row.p50_ms:.2f} ms",
        tail_text(row),
    )


def success_text(row: DeployedSetting) -> str:
    """Return a setting's success with its interval, for a table."""
    if row.success is None or row.success_interval is None:
        return "not run"
    low, high = row.success_interval
    return f"{row.success:.1%} [{low:.1%}, {high:.1%}]"


def tail_text(row: DeployedSetting) -> str:
    """Return the tail of a setting's latency, for a table; empty where it was not measured."""
    if row.tail_ms is None:
        return ""
    return f"{row.tail_ms:.2f} ms" if row.tail == "p99" else f"{row.tail} {row.tail_ms:.2f} ms"


def _described(measured: Sensitivities) -> str:
    channels = sum(v.shape[1] for v in measured.values.values())
    codes = "compensated" if measured.quantizer.needs_moments else "nearest"
    how = f"{measured.method}{', step by step' * bool(measured.settings.get('per_step'))}"
    return f"{channels} channels, {how}, {codes} codes, {measured.samples} observations"


def _standard_error(measured: Sensitivities) -> str:
    """Lines for a terminal; the report has a table."""
    error = measured.standard_error
    if error is None or error.median is None or error.median_by_probes is None:
        return "standard error: unknown"
    by_probes = (error.median_by_probes / error.median) ** 2 if error.median else 0.0
    whole = zip(measured.widths, error.by_width["all layers"].error, strict=True)
    by_width = ", ".join(f"{share:.0%} at {bits} bits" for bits, share in whole)
    return (
        f"standard error: {error.median:.1%} of the median layer and width, probes make "
        f"{by_probes:.0%} of its square; {error.layers:.0%} of the worst, {error.channels:.0%} of "
        f"the median channel; of all layers together {by_width}"
    )
