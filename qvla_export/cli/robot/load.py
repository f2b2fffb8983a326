"""`qvla load`: what a server does when requests come at their own times, not at its own."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from qvla_export.cli.options import A_FILE, A_RECORDING, JsonOption
from qvla_export.cli.progress import NARROW, print_result, progress_shown


def load(
    server: Annotated[str, typer.Argument(help="HOST:PORT of the protocol, or https://HOST:PORT.")],
    protocol: Annotated[
        Literal["act", "openpi", "gr00t", "vla-eval"],
        typer.Option(help="POST /act, openpi's or vla-eval's websocket, GR00T's ZMQ."),
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
        typer.Option(
            help="The same server's HTTP port; GR00T's and vla-eval's protocols say too little."
        ),
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
    from jetson.clients.load_texts import load_texts
    from qvla_export.pipeline.robot.load import LoadRequest, load_server

    plan = LoadPlan(rate, duration, clients, arrivals, seed, timeout)
    request = LoadRequest(
        server, protocol, plan, deadline_ms, recording, side, metadata_port, token_file
    )
    with progress_shown() as on_progress:
        result = load_server(request, on_progress)
    if output is not None:
        result.save(output)
    print_result(result, load_texts(result, output), as_json, NARROW)
    if not result.has_reply.any():
        raise typer.Exit(1)
