"""Measure latency through the code path that serves: real bodies, the real handler."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np

from jetson.board import BoardState, ask_board
from jetson.clients.http_client import RemotePolicy
from jetson.errors import PolicyFailure
from jetson.latency.comparison import LatencyComparison, compare_profiles
from jetson.latency.profile import LatencyProfile
from jetson.serving.policy_contract import PolicyContract
from jetson.serving.service import ActionService
from jetson.serving.wire import decode_request, encode_request
from qvla_export.shared.action import ActionPolicy
from qvla_export.shared.artifacts import versions
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.latency_statistics import Deadline
from qvla_export.shared.observation import Observation

# Called with (actions done, actions in all).
OnProgress = Callable[[int, int], None]

# Before those that count.
WARMUP_ROUNDS = 10


@dataclass(frozen=True)
class ProfileSubject:
    """A policy to be measured, and what its profile records beside the samples."""

    # Measured in this process, or the URL of a `qvla serve`.
    policy: ActionPolicy | str
    # Loading time, where whoever opened the policy measured it.
    load_ms: float | None = None
    # How the engine runs (threads, weights); empty where nobody says.
    conditions: str = ""


class _Sample(NamedTuple):
    start_ns: int
    # Span -> milliseconds.
    timing_ms: Mapping[str, float]


class _Endpoint(Protocol):
    contract: PolicyContract
    transport: str

    def request(self, body: bytes) -> Mapping[str, float]:
        """Answer one body; return span -> milliseconds with "total"."""
        ...


# Also where the body is OpenVLA's, whose clients expect the first action alone.
_WHOLE_CHUNK = partial(decode_request, reply="chunk")


class _InProcess:
    transport = "in-process"

    def __init__(self, policy: ActionPolicy) -> None:
        self._service = ActionService(policy)
        self.contract = self._service.contract

    def request(self, body: bytes) -> Mapping[str, float]:
        answer = self._service.answer(body, _WHOLE_CHUNK)
        if answer.status != 200:
            raise PolicyFailure(f"an action failed while measuring: {answer.body.decode()}")
        return answer.timing_ms


class _OverHttp:
    transport = "http"

    def __init__(self, remote: RemotePolicy) -> None:
        self._remote = remote
        self.contract = remote.contract

    def request(self, body: bytes) -> Mapping[str, float]:
        return self._remote.post(body, "chunk")[1]


def profile_latency(
    subjects: Mapping[str, ProfileSubject],
    observations: Sequence[Observation],
    warmup: int = WARMUP_ROUNDS,
    samples: int = 200,
    on_progress: OnProgress | None = None,
    deadline: Deadline | None = None,
    seed: int = 0,
) -> LatencyComparison:
    """Measure one or more policies, interleaved action by action; the first is the baseline.

    Each round sends one observation to every policy, in an order drawn anew, so that a slow moment
    of the machine hits all of them alike and none always follows the same other: who comes after
    whom changes what the caches hold.

    Args:
        subjects: name -> policy.
        observations: sent in turn.
        warmup: rounds before the samples.
        samples: rounds measured.
        on_progress: called after every action.
        deadline: until when actions are wanted, for the record.
        seed: of the order.

    Raises:
        QvlaError: there is nothing to measure, or an observation does not fit a policy.
        PolicyFailure: a policy failed; nothing is returned of a run with holes.
    """
    if not subjects or not observations or samples < 1 or warmup < 0:
        raise QvlaError(
            f"profiling needs policies, observations, samples >= 1 and warmup >= 0; got "
            f"{len(subjects)}, {len(observations)}, {samples} and {warmup}"
        )
    opened: list[RemotePolicy] = []
    try:
        endpoints = {name: _endpoint(s.policy, opened) for name, s in subjects.items()}
        before = ask_board()
        turns = _turns(list(endpoints), warmup + samples, seed)
        taken = _measure(endpoints, observations, turns, on_progress)
        boards = before, ask_board()
    finally:
        for remote in opened:
            remote.close()
    profiles = [
        _profile(name, subjects[name], endpoint, taken[name], warmup, boards)
        for name, endpoint in endpoints.items()
    ]
    return compare_profiles(profiles, deadline)


def _turns(names: Sequence[str], rounds: int, seed: int) -> list[list[str]]:
    """Return each round's order, drawn anew."""
    order = np.random.default_rng(seed)
    return [[names[index] for index in order.permutation(len(names))] for _ in range(rounds)]


def _endpoint(policy: ActionPolicy | str, opened: list[RemotePolicy]) -> _Endpoint:
    if isinstance(policy, str):
        opened.append(RemotePolicy(policy))
        return _OverHttp(opened[-1])
    return _OverHttp(policy) if isinstance(policy, RemotePolicy) else _InProcess(policy)


def _measure(
    endpoints: Mapping[str, _Endpoint],
    observations: Sequence[Observation],
    turns: Sequence[Sequence[str]],
    on_progress: OnProgress | None,
) -> dict[str, list[_Sample]]:
    """Return each endpoint's actions, one a round."""
    used = observations[: len(turns)]
    bodies = {
        name: [encode_request(observation, endpoint.contract) for observation in used]
        for name, endpoint in endpoints.items()
    }
    taken: dict[str, list[_Sample]] = {name: [] for name in endpoints}
    for index, names in enumerate(turns):
        for name in names:
            body = bodies[name][index % len(used)]
            start_ns = time.perf_counter_ns()
            taken[name].append(_Sample(start_ns, endpoints[name].request(body)))
            if on_progress is not None:
                on_progress(sum(map(len, taken.values())), len(turns) * len(names))
    return taken


def _profile(
    name: str,
    subject: ProfileSubject,
    endpoint: _Endpoint,
    taken: Sequence[_Sample],
    warmup: int,
    boards: tuple[BoardState, BoardState],
) -> LatencyProfile:
    measured = taken[warmup:]
    spans = dict.fromkeys(span for action in measured for span in action.timing_ms)
    starts_ns = np.array([action.start_ns for action in measured])
    return LatencyProfile(
        name=name,
        # A span that did not run in some action took no time there.
        samples_ms={s: np.array([a.timing_ms.get(s, 0.0) for a in measured]) for s in spans},
        started_ms=(starts_ns - starts_ns[0]) / 1e6,
        warmup=warmup,
        first_action_ms=taken[0].timing_ms["total"],
        load_ms=subject.load_ms,
        transport=endpoint.transport,
        bundle_digest=endpoint.contract.bundle_digest,
        target=endpoint.contract.target,
        horizon=endpoint.contract.horizon,
        versions=versions(),
        board_before=boards[0],
        board_after=boards[1],
        conditions=subject.conditions,
    )
