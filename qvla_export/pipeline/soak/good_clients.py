"""Clients that do everything right: each must get the answer to its own request, always."""

import re
import threading
import time
from dataclasses import dataclass, field
from typing import get_args

from jetson.clients.endpoint import Endpoint
from jetson.clients.protocol_clients import ProtocolClient, ProtocolName, open_client
from qvla_export.pipeline.soak.numbered_policy import answers, observation_of
from qvla_export.pipeline.soak.server_process import Address
from qvla_export.pipeline.soak.tally import NO_REPLY, Tally
from qvla_export.shared.errors import InvalidObservation, QvlaError

PROTOCOLS: tuple[ProtocolName, ...] = get_args(ProtocolName)
# How long a reply may take: longer than any pause of the server.
_TIMEOUT_S = 60.0
_ANSWER_S = 120.0
# How clients say that nothing came back; a reason of the server's follows "answered", or a colon.
_SILENCE = re.compile(r"^(\w+ )?\w+://\S+ (failed: |gave no reply)")


def endpoint_of(address: Address, protocol: ProtocolName) -> Endpoint:
    """Return where a protocol is spoken."""
    return address.gr00t if protocol == "gr00t" else address.http


@dataclass
class GoodClients:
    """One client a protocol, each on a thread, at a fixed rate. A context manager."""

    address: Address
    rate_hz: float
    # Phase and protocol -> what became of the requests sent in it.
    tallies: dict[tuple[str, ProtocolName], Tally] = field(default_factory=dict)
    # In which phase requests are sent now.
    phase: str = ""

    def __post_init__(self) -> None:
        self.begin("warm-up")
        self._over = threading.Event()
        self._clients = {
            name: open_client(name, endpoint_of(self.address, name), None, _TIMEOUT_S)
            for name in PROTOCOLS
        }
        self._threads = [
            threading.Thread(target=self._work, args=(name, number), name=f"soak-{name}")
            for number, name in enumerate(PROTOCOLS, 1)
        ]

    def __enter__(self) -> "GoodClients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Send nothing more; wait for the replies under way."""
        if not self._over.is_set():
            self._over.set()
            for thread in self._threads:
                thread.join()
            for client in self._clients.values():
                client.close()

    def begin(self, phase: str) -> None:
        """Count what is sent from now on as of a phase."""
        for name in PROTOCOLS:
            self.tallies.setdefault((phase, name), Tally())
        self.phase = phase

    def await_answers(self) -> None:
        """Wait until every client got one more answer, however busy the machine is.

        Raises:
            QvlaError: one gets none in two minutes.
        """
        phase, end_s = self.phase, time.monotonic() + _ANSWER_S
        before = {name: self.tallies[phase, name].answered for name in PROTOCOLS}
        while any(self.tallies[phase, name].answered <= before[name] for name in PROTOCOLS):
            if time.monotonic() > end_s:
                raise QvlaError(
                    f"a good client got no answer for {_ANSWER_S:g} s in the phase {phase!r}"
                )
            time.sleep(0.01)

    def _work(self, protocol: ProtocolName, number: int) -> None:
        client, request = self._clients[protocol], 0
        due_s = time.monotonic()
        while not self._over.is_set():
            ask(client, number, request, self.tallies[self.phase, protocol])
            request += 1
            # What was missed while the server stood still is not made up for.
            due_s = max(due_s + 1.0 / self.rate_hz, time.monotonic() - 1.0 / self.rate_hz)
            self._over.wait(max(0.0, due_s - time.monotonic()))


def ask(client: ProtocolClient, number: int, request: int, tally: Tally) -> None:
    """Send one request and count what comes back."""
    tally.sent += 1
    start_ns = time.perf_counter_ns()
    try:
        actions = client.ask(observation_of(number, request))
    except InvalidObservation as error:
        tally.refuse(str(error))
    except QvlaError as error:
        text = str(error)
        if _SILENCE.search(text):
            tally.wrong[f"{NO_REPLY}: {text[:120]}"] += 1
        else:
            tally.refuse(text)
    else:
        if answers(actions, number, request):
            tally.answered += 1
            tally.times_ms.append((time.perf_counter_ns() - start_ns) / 1e6)
        else:
            tally.wrong["the answer to another request"] += 1
