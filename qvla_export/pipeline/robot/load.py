"""Put a server under load: requests at their own times, whatever the server does."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from qvla_export.pipeline.progress import OnProgress, bar, ignore
from qvla_export.shared.errors import QvlaError

if TYPE_CHECKING:
    from jetson.clients.endpoint import Endpoint
    from jetson.clients.load import Ask, LoadPlan
    from jetson.clients.load_result import LoadResult
    from jetson.clients.protocol_clients import ProtocolClient, ProtocolName
    from jetson.serving.policy_contract import PolicyContract
    from qvla_export.shared.observation import Observation


@dataclass(frozen=True)
class LoadRequest:
    """Which server is asked, and what."""

    # HOST:PORT of the protocol, or https://HOST:PORT.
    server: str
    protocol: "ProtocolName"
    plan: "LoadPlan"
    # Replies later than this count as missed, milliseconds; None counts none.
    deadline_ms: float | None = None
    # MCAP file whose observations are sent; None for noise.
    recording: Path | None = None
    # Pixels of a side of images of noise; None for the size that the policy says.
    side: int | None = None
    # The same server's HTTP port, where its protocol does not say what the policy takes.
    metadata_port: int | None = None
    token_file: Path | None = None


def load_server(request: LoadRequest, on_progress: OnProgress = ignore) -> "LoadResult":
    """Send observations at a fixed rate; return every request's times from when it was due.

    Raises:
        QvlaError: the server cannot be reached or refuses, or does not say what to send it.
    """
    from jetson.board import read_board_state
    from jetson.clients.endpoint import Endpoint
    from jetson.clients.load import run_load
    from jetson.clients.load_result import LoadResult
    from jetson.clients.protocol_clients import open_client
    from jetson.serving.security import read_token

    plan = request.plan
    endpoint, token = Endpoint.parse(request.server), read_token(request.token_file)
    with ExitStack() as stack:
        clients: list[ProtocolClient] = []
        for _ in range(plan.clients):
            clients.append(open_client(request.protocol, endpoint, token, plan.grace_s))
            stack.callback(clients[-1].close)
        contract = _contract(clients[0], endpoint, request.metadata_port, token)
        observations, description = _observations(contract, request)
        board = read_board_state()
        # Whatever is wrong with all requests is said before any is counted.
        for client in clients:
            client.ask(observations[0])
        asks = [_ask_of(client, observations) for client in clients]
        times = run_load(asks, plan, on_progress=bar(on_progress, "requests"))
    return LoadResult(
        request.protocol, request.server, plan, times, request.deadline_ms, description, board
    )


def _ask_of(client: "ProtocolClient", observations: "Sequence[Observation]") -> "Ask":
    return lambda index: client.ask(observations[index % len(observations)])


def _contract(
    client: "ProtocolClient", endpoint: "Endpoint", metadata_port: int | None, token: str | None
) -> "PolicyContract | None":
    """Return what the policy takes, as its server or that server's HTTP port says it."""
    from jetson.clients.http_client import RemotePolicy
    from jetson.clients.protocol_clients import contract_of_client

    if metadata_port is None:
        return contract_of_client(client)
    metadata = replace(endpoint, port=metadata_port)
    with RemotePolicy(metadata.url("http"), token=token) as remote:
        return remote.contract


def _observations(
    contract: "PolicyContract | None", request: LoadRequest
) -> "tuple[list[Observation], str]":
    """Return what to send, in turn, and what that is in words."""
    from jetson.clients.load import random_observations
    from jetson.recording.reader import Recording

    side = request.side
    if request.recording is not None:
        return Recording(request.recording).observations(), request.recording.name
    if contract is None:
        raise QvlaError(
            "this server does not say which cameras and how long a state its policy takes: give "
            "--metadata-port (the HTTP port of the same `qvla serve`) or --recording"
        )
    height, width = contract.frame_size if side is None else (side, side)
    images = f"{len(contract.cameras)} random images of {height} x {width}"
    words = f"{images}, state {contract.state_dim}"
    return random_observations(contract, side, seed=request.plan.seed), words
