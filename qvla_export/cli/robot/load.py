"""`qvla load`: what a server does when requests come at their own times, not at its own."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from qvla_export.cli.options import A_FILE, A_RECORDING, JsonOption
from qvla_export.cli.progress import print_json, progress_shown

if TYPE_CHECKING:
    from jetson.clients.load_result import LoadResult

# Wide enough wherever nobody looks at a terminal.
_TABLE_WIDTH = 100


def load(
    server: Annotated[str, typer.Argument(help="HOST:PORT of the protocol, or https://HOST:PORT.")],
    protocol: Annotated[
        Literal["act", "openpi", "gr00t"],
        typer.Option(help="POST /act, openpi's websocket, GR00T's ZMQ."),
    ] = "openpi",
    rate: Annotated[float, typer.Option(help="Requests a second, all connections together.")] = 10,
    duration: Annotated[float, typer.Option(help="Seconds in which requests are due.")] = 30,
    clients: Annotated[int, typer.Option(help="Connections; one request at a time each.")] = 4,
    arrivals: Annotated[
        Literal["constant", "poisson"],
        typer.Option(help="Equally far apart, or as of many robots that know nothing of another."),
    ] = "constant",
    seed: Annotated[int, typer.Option(help="Of Poisson arrivals and random observations.")] = 0,
    deadline_ms: Annotated[
        float | None, typer.Option(min=0.001, help="Replies later than this count as missed.")
    ] = None,
    recording: Annotated[
        Path | None,
        typer.Option(
            help="MCAP file whose observations are sent; else random ones.",
            callback=A_RECORDING.require,
        ),
    ] = None,
    side: Annotated[
        int | None, typer.Option(min=1, help="Pixels of a side of random images; default: its.")
    ] = None,
    metadata_port: Annotated[
        int | None,
        typer.Option(help="The same server's HTTP port; GR00T's protocol does not say everything."),
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(help="File with the server's token; or QVLA_TOKEN.", callback=A_FILE.require),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option(
            min=0.001,
            help="Seconds a reply may take, and late requests are sent after the last was due.",
        ),
    ] = 30,
    output: Annotated[
        Path | None, typer.Option(help="JSON file to write, with every request's times.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Send observations at a fixed rate and measure from when each request was due.

    A server that stalls is then seen as a robot sees it: everything due in the stall is late. The
    time from sending to reply is reported beside it. Exit 1 where nothing was answered.
    """
    from jetson.clients.load import LoadPlan
    from qvla_export.pipeline.robot.load import LoadRequest, load_server

    plan = LoadPlan(rate, duration, clients, arrivals, seed, timeout)
    request = LoadRequest(
        server, protocol, plan, deadline_ms, recording, side, metadata_port, token_file
    )
    with progress_shown() as on_progress:
        result = load_server(request, on_progress)
    if output is not None:
        result.save(output)
    if as_json:
        print_json(result.to_json())
    else:
        _print(result)
        written = "" if output is None else f" -> {output}"
        typer.echo(f"load: {len(result.times.due_s)} requests{written}")
    if not result.has_reply.any():
        raise typer.Exit(1)


def _print(result: "LoadResult") -> None:
    from qvla_export.shared.latency_statistics import PERCENTS, percentile_text

    table = Table(title=f"{result.protocol} at {result.server}, {result.observations}, ms")
    table.add_column("time")
    for column in (*(f"p{percent:g}" for percent in PERCENTS), "max"):
        table.add_column(column, justify="right")
    rows = {
        "due to reply (corrected)": result.corrected_ms,
        "sent to reply (service)": result.service_ms,
        "waited for a connection": result.waited_ms,
        "the generator's own delay": result.lag_ms,
    }
    for name, samples in rows.items():
        if samples.size:
            figures = [percentile_text(samples, percent) for percent in PERCENTS]
            table.add_row(name, *figures, f"{samples.max():.2f}")
    Console(width=_TABLE_WIDTH).print(table)
    for line in _lines(result):
        typer.echo(line)


def _lines(result: "LoadResult") -> list[str]:
    total, answered = len(result.times.due_s), int(result.has_reply.sum())
    lines = [
        f"{answered} of {total} requests answered, {result.achieved_hz:.4g} Hz achieved, "
        f"{result.plan.rate_hz:g} Hz asked ({result.plan.arrivals}, "
        f"{result.plan.clients} connections)"
    ]
    misses = result.misses
    if misses is not None:
        lines.append(
            f"{misses.count} ({misses.share:.2%}) missed the deadline of {result.deadline_ms:g} "
            f"ms, at most {misses.longest_run} in a row"
        )
    lines += [f"failed: {count} x {reason}" for reason, count in result.reasons.items()]
    return lines + result.notes()
