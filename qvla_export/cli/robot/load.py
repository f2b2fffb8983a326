"""`qvla load`: what a server does when requests come at their own times, not at its own."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from qvla_export.cli.options import A_FILE, A_RECORDING
from qvla_export.shared.errors import QvlaError

if TYPE_CHECKING:
    from jetson.clients.load import LoadPlan, LoadTimes
    from jetson.clients.load_result import LoadResult
    from jetson.clients.protocol_clients import Endpoint, ProtocolClient
    from jetson.serving.policy_contract import PolicyContract
    from qvla_export.shared.observation import Observation

# Wide enough wherever nobody looks at a terminal.
_TABLE_WIDTH = 100


def load(
    server: Annotated[str, typer.Argument(help="HOST:PORT of the protocol, or https://HOST:PORT.")],
    output: Annotated[Path, typer.Option(help="JSON file with every request's times.")],
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
    side: Annotated[int, typer.Option(min=1, help="Pixels of a side of random images.")] = 224,
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
) -> None:
    """Send observations at a fixed rate and measure from when each request was due.

    A server that stalls is then seen as a robot sees it: everything due in the stall is late. The
    time from sending to reply is reported beside it. Exit 1 where nothing was answered.
    """
    from jetson.board import read_board_state
    from jetson.clients.load import LoadPlan
    from jetson.clients.load_result import LoadResult
    from jetson.clients.protocol_clients import Endpoint, open_client
    from jetson.serving.security import read_token

    plan = LoadPlan(rate, duration, clients, arrivals, seed, timeout)
    endpoint, token = Endpoint.parse(server), read_token(token_file)
    metadata = None if metadata_port is None else replace(endpoint, port=metadata_port)
    with ExitStack() as stack:
        opened: list[ProtocolClient] = []
        for _ in range(clients):
            opened.append(open_client(protocol, endpoint, token, timeout))
            stack.callback(opened[-1].close)
        contract = _contract(opened[0], metadata, token)
        sent, said = _observations(contract, recording, side, seed)
        board = read_board_state()
        times = _send(opened, sent, plan)
    result = LoadResult(protocol, server, plan, times, deadline_ms, said, board)
    result.save(output)
    _print(result)
    typer.echo(f"load: {len(times.due_s)} requests -> {output}")
    if not result.answered.any():
        raise typer.Exit(1)


def _send(
    clients: "list[ProtocolClient]", sent: "list[Observation]", plan: "LoadPlan"
) -> "LoadTimes":
    from jetson.clients.load import run_load

    def ask_of(client: "ProtocolClient") -> Callable[[int], None]:
        def ask(index: int) -> None:
            client.ask(sent[index % len(sent)])

        return ask

    # Whatever is wrong with all requests is said before any is counted.
    for client in clients:
        client.ask(sent[0])
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("requests", total=len(plan.due_s()))
        asks = [ask_of(client) for client in clients]
        return run_load(asks, plan, on_reply=lambda: progress.advance(task))


def _contract(
    client: "ProtocolClient", metadata: "Endpoint | None", token: str | None
) -> "PolicyContract | None":
    """Return what the policy takes, as its server or that server's HTTP port says it."""
    from jetson.clients.http_client import RemotePolicy
    from jetson.clients.protocol_clients import contract_of_client

    if metadata is None:
        return contract_of_client(client)
    with RemotePolicy(metadata.url("http"), token=token) as remote:
        return remote.contract


def _observations(
    contract: "PolicyContract | None", recording: Path | None, side: int, seed: int
) -> "tuple[list[Observation], str]":
    """Return what to send, in turn, and what that is in words."""
    from jetson.clients.load import random_observations

    if recording is not None:
        from jetson.recording.reader import Recording

        return Recording(recording).observations(), str(recording.name)
    if contract is None:
        raise QvlaError(
            "this server does not say which cameras and how long a state its policy takes: give "
            "--metadata-port (the HTTP port of the same `qvla serve`) or --recording"
        )
    said = f"{len(contract.cameras)} random images of {side} x {side}, state {contract.state_dim}"
    return random_observations(contract, side, seed=seed), said


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
    for line in _said(result):
        typer.echo(line)


def _said(result: "LoadResult") -> list[str]:
    total, answered = len(result.times.due_s), int(result.answered.sum())
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
