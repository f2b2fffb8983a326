"""One policy behind one lock: what every protocol, the server and the profile share.

A request body goes decode -> act -> encode; `act` lets nothing through that is not a finite
action of the promised shape. Protocols differ in decoding and encoding only.
"""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from jetson.errors import ClientLeft, PolicyFailure, ServerBusy, forget_frames, http_status
from jetson.guarded_policy import guarded
from jetson.repeated_warning import RepeatedWarning
from jetson.serving.policy_contract import PolicyContract, contract_of
from jetson.serving.request_observer import Observers, ServedRequest
from jetson.serving.wire import decode_request, encode_request
from qvla_export.shared.action import ActionChunk, ActionPolicy
from qvla_export.shared.errors import InvalidObservation, QvlaError
from qvla_export.shared.observation import Observation

_LOG = logging.getLogger(__name__)
# No inference of a robot takes so long; one that does will not end.
INFER_TIMEOUT_S = 30.0
_LOOK_S = 1.0


class Request(Protocol):
    """A decoded request, which knows the form its reply must have."""

    @property
    def observation(self) -> Observation:
        """What the client sees."""
        ...

    def encode(self, chunk: ActionChunk, infer_ms: float) -> bytes:
        """Return the body of the reply; `infer_ms` is what the policy took."""
        ...


# How a protocol reads a request: its body, or the map it found there. Raises only QvlaError
# for what that holds.
Decoder = Callable[[Any, PolicyContract], Request]


@dataclass(frozen=True)
class Answer:
    """The reply to one request."""

    # The protocol's reply with the actions, or the JSON reason why there are none.
    body: bytes
    # Span -> milliseconds; "total" covers them all.
    timing_ms: Mapping[str, float]
    # Why there is no action; None where there is one.
    error: QvlaError | None = None

    @property
    def status(self) -> int:
        """HTTP status; 200 carries an action, everything else a reason."""
        return 200 if self.error is None else http_status(self.error)

    @classmethod
    def of_error(cls, error: QvlaError, timing_ms: Mapping[str, float] | None = None) -> "Answer":
        """Return the answer that says why there is no action."""
        return cls(error_body(error), timing_ms or {}, error)


class ActionService:
    """Answers requests with the actions of one policy, one inference at a time."""

    def __init__(
        self,
        policy: ActionPolicy,
        contract: PolicyContract | None = None,
        infer_timeout_s: float = INFER_TIMEOUT_S,
    ) -> None:
        """Take a policy.

        Args:
            policy: one inference of it runs at a time.
            contract: what it needs; by default its processor's.
            infer_timeout_s: after which an inference counts as stuck.
        """
        self.contract = contract_of(policy) if contract is None else contract
        self._stuck = RepeatedWarning(_LOG)
        # Who is told of every request; set once the policy is warm.
        self.observers = Observers()
        self._policy = guarded(policy)
        # Engines are not re-entrant, and two at once would spoil each other's latency.
        self._lock = threading.Lock()
        self._infer_timeout_s = infer_timeout_s
        # When the inference under way began; None between inferences.
        self._began_s: float | None = None

    @property
    def fault(self) -> str | None:
        """Why no action can be expected: the engine does not come back; None while it does."""
        began_s = self._began_s
        if began_s is None or (stuck_s := time.monotonic() - began_s) < self._infer_timeout_s:
            return None
        return f"an inference has not ended for {stuck_s:.0f} s; restart the server"

    def require_alive(self) -> None:
        """Refuse work that would only wait behind a stuck engine.

        Raises:
            ServerBusy: the engine does not come back.
        """
        if fault := self.fault:
            self._stuck.warn(fault)
            raise ServerBusy(fault)

    def act(
        self, observation: Observation, wanted: Callable[[], bool] = lambda: True
    ) -> ActionChunk:
        """Return the next actions: finite, float32 [horizon, dim].

        Args:
            observation: what the client sees.
            wanted: asked once the engine is free; False where nobody waits any more.

        Raises:
            ClientLeft: nobody waits for the action any more.
            ServerBusy: an inference before this one does not end.
            InvalidObservation: the observation does not fit the policy.
            PolicyFailure: the policy failed, or returned something that is no such action.
        """
        self.contract.check(observation)
        start_ns = time.perf_counter_ns()
        try:
            with self._engine():
                if not wanted():
                    raise ClientLeft("the client left while others were answered")
                chunk = self._policy.infer(observation)
        except (InvalidObservation, ClientLeft, ServerBusy):
            raise
        except Exception as error:
            raise PolicyFailure(
                f"the policy failed: {type(error).__name__}: {error}; see the server's log"
            ) from error
        infer_ms = (time.perf_counter_ns() - start_ns) / 1e6
        self._check_chunk(chunk)
        timing_ms = {name: float(ms) for name, ms in chunk.timing_ms.items()}
        return ActionChunk(chunk.actions, chunk.normalized, timing_ms or {"infer": infer_ms})

    @contextlib.contextmanager
    def _engine(self) -> Iterator[None]:
        """Hold the engine; give up where it is stuck.

        Raises:
            ServerBusy: somebody else's inference does not end.
        """
        while not self._lock.acquire(timeout=_LOOK_S):
            self.require_alive()
        self._began_s = time.monotonic()
        try:
            yield
        finally:
            self._began_s = None
            self._lock.release()

    def answer(
        self,
        body: Any,
        decode: Decoder = decode_request,
        wanted: Callable[[], bool] = lambda: True,
    ) -> Answer:
        """Return the reply to one request; never raises for what a body holds.

        What is the client's fault is for the protocol to log, which knows the client.
        """
        # Not a SpanClock: its context managers cost more here than decoding an observation.
        marks_ns = [time.perf_counter_ns()]
        spans_ms: Mapping[str, float] = {}
        failure: QvlaError | None = None
        seen: Observation | None = None
        chunk: ActionChunk | None = None
        try:
            request = decode(body, self.contract)
            marks_ns.append(time.perf_counter_ns())
            seen = request.observation
            chunk = self.act(seen, wanted)
            marks_ns.append(time.perf_counter_ns())
            spans_ms = chunk.timing_ms
            content = request.encode(chunk, (marks_ns[2] - marks_ns[1]) / 1e6)
        except QvlaError as error:
            failure = error
        except Exception as error:  # a mistake of ours is answered too, and ends no thread
            failure = PolicyFailure(f"the server failed: {type(error).__name__}: {error}")
            failure.__cause__ = error
        if failure is not None:
            content, chunk = error_body(failure), None
            # An engine that is stuck is told of once, not by everybody who asks.
            if http_status(failure) >= 500 and not isinstance(failure, ServerBusy):
                _LOG.error("no action: %s", failure, exc_info=failure)
            forget_frames(failure)
        answer = Answer(content, _spans_ms(marks_ns, spans_ms), failure)
        if self.observers:
            self.observers.on_request(ServedRequest(seen, chunk, answer.timing_ms, failure))
        return answer

    def warm_up(self, count: int, observation: Observation | None = None) -> float:
        """Answer `count` requests that nobody sent; return the first one's milliseconds.

        Raises:
            PolicyFailure: the policy does not act even on a valid observation.
        """
        body = encode_request(observation or self.contract.blank_observation(), self.contract)
        first_ms = 0.0
        for index in range(count):
            answer = self.answer(body)
            if answer.status != 200:
                raise PolicyFailure(
                    f"warm-up failed, the port stays closed: {json.loads(answer.body)['error']}"
                )
            first_ms = first_ms if index else answer.timing_ms["total"]
        return first_ms

    def _check_chunk(self, chunk: ActionChunk) -> None:
        arrays = [getattr(chunk, name, None) for name in ("actions", "normalized")]
        if any(not isinstance(a, np.ndarray) or a.dtype.kind != "f" for a in arrays):
            raise PolicyFailure(
                f"the policy must return an ActionChunk of floats, got {type(chunk).__name__}; "
                "see qvla_export.shared.action"
            )
        shape = (self.contract.horizon, self.contract.action_dim)
        if chunk.actions.shape != shape or chunk.normalized.shape != shape:
            raise PolicyFailure(
                f"the policy must return actions {list(shape)}, got {list(chunk.actions.shape)} "
                f"and normalized {list(chunk.normalized.shape)}; export the bundle anew"
            )
        if not (np.isfinite(chunk.actions).all() and np.isfinite(chunk.normalized).all()):
            bad = np.argwhere(~(np.isfinite(chunk.actions) & np.isfinite(chunk.normalized)))
            raise PolicyFailure(
                f"the policy returned NaN or infinity at [step, dimension] {bad[:4].tolist()}; "
                "no action is sent. Verify the engine against its golden observations"
            )


def _spans_ms(marks_ns: list[int], acting_ms: Mapping[str, float]) -> dict[str, float]:
    """Return spans in order from the instants between them, as far as the request came."""
    now_ns = time.perf_counter_ns()
    start_ns, decoded_ns, acted_ns = (*marks_ns, now_ns, now_ns)[:3]
    spans = {"decode": (decoded_ns - start_ns) / 1e6, **acting_ms}
    spans.pop("total", None)
    if len(marks_ns) == 3:
        spans["encode"] = (now_ns - acted_ns) / 1e6
    return {**spans, "total": (now_ns - start_ns) / 1e6}


def error_body(error: Exception) -> bytes:
    """Return the JSON reason of an error: {"error": message, "kind": class}."""
    return json.dumps({"error": str(error), "kind": type(error).__name__}).encode()
