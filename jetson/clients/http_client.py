"""A policy on another machine behind the same interface as a local one."""

import json
import re
from collections.abc import Mapping

import httpx

from jetson.errors import RemoteError, WireError
from jetson.serving.policy_contract import PolicyContract
from jetson.serving.security import client_tls, read_token
from jetson.serving.wire import decode_reply, encode_request
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.clock import SpanClock, whole_spans
from qvla_export.shared.errors import InvalidObservation, QvlaError
from qvla_export.shared.observation import Observation

_SPAN = re.compile(r"([A-Za-z0-9_.-]+);dur=([0-9]+(?:\.[0-9]+)?)", re.ASCII)


class RemotePolicy:
    """Acts through the `POST /act` of a `qvla serve`. A context manager; one connection."""

    # What the server's policy takes and returns.
    contract: PolicyContract

    def __init__(self, url: str, timeout_s: float = 30.0, token: str | None = None) -> None:
        """Connect and read the server's metadata.

        Args:
            url: where `qvla serve` listens.
            timeout_s: seconds that connecting, and each reply, may take.
            token: what the server asks for; by default the environment's QVLA_TOKEN. Certificates
                are the environment's too: QVLA_TLS_CA, QVLA_TLS_CERT, QVLA_TLS_KEY.

        Raises:
            RemoteError: nobody answers there, or not with a policy's metadata.
            RefusedSetting: the environment's token or certificates cannot be used.
        """
        if not url.startswith(("http://", "https://")):
            raise RemoteError(f"a server URL starts with http:// or https://, got {url!r}")
        self.url = url.rstrip("/")
        # A proxy from the environment would see, and delay, what the robot sees.
        self._http = httpx.Client(
            base_url=self.url,
            timeout=timeout_s,
            trust_env=False,
            verify=client_tls() or True,
            headers=_authorization(read_token() if token is None else token),
        )
        try:
            reply = self._send("GET", "/metadata")
            self.contract = PolicyContract.from_json(_json(reply))
        except WireError as error:
            self.close()
            raise RemoteError(f"{self.url}/metadata: {error}") from None
        except QvlaError:
            self.close()
            raise

    def infer(self, observation: Observation) -> ActionChunk:
        """Return the remote policy's next actions; span "transport" is the way there and back.

        Raises:
            InvalidObservation: the observation does not fit the policy.
            RemoteError: the server failed or cannot be reached.
        """
        body = encode_request(observation, self.contract)
        content, timing_ms = self.post(body)
        try:
            chunk = decode_reply(content)
        except WireError as error:
            raise RemoteError(f"{self.url}/act answered unreadably: {error}") from None
        shape = (self.contract.horizon, self.contract.action_dim)
        if not chunk.actions.shape == chunk.normalized.shape == shape:
            raise RemoteError(f"{self.url}/act must send {shape}, got {chunk.actions.shape}")
        spans = {name: ms for name, ms in timing_ms.items() if name != "total"}
        return ActionChunk(chunk.actions, chunk.normalized, spans)

    def post(self, body: bytes, reply: str = "full") -> tuple[bytes, dict[str, float]]:
        """Send one request body; return the reply's body and its spans in ms with "total".

        Raises:
            InvalidObservation: the server refused the observation.
            RemoteError: the server failed or cannot be reached.
        """
        clock = SpanClock()
        with clock.span("total"):
            response = self._send("POST", "/act", body, reply)
        found = _SPAN.findall(response.headers.get("server-timing", ""))
        spans = {name: float(ms) for name, ms in found}
        total_ms = clock.timing_ms["total"]
        spans["transport"] = max(total_ms - spans.pop("total", _sum_ms(spans)), 0.0)
        return response.content, {**spans, "total": total_ms}

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def __enter__(self) -> "RemotePolicy":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(
        self, method: str, path: str, body: bytes | None = None, reply: str | None = None
    ) -> httpx.Response:
        headers = {"content-type": "application/json"} if body is not None else None
        params = {"reply": reply} if reply is not None else None
        try:
            response = self._http.request(
                method, path, content=body, params=params, headers=headers
            )
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise RemoteError(
                f"{method} {self.url}{path} failed: {type(error).__name__}: {error}; "
                "is `qvla serve` running there?"
            ) from error
        if response.content == b'"error"':
            raise RemoteError(
                f'{self.url}{path} answered "error" (strict compatibility); the reason is in '
                "the server's log"
            )
        if response.status_code == 422:
            raise InvalidObservation(
                f"{self.url}{path} refused the observation: {_reason(response)}"
            )
        if response.status_code != 200:
            raise RemoteError(
                f"{self.url}{path} answered {response.status_code}: {_reason(response)}"
            )
        return response


def _sum_ms(spans: Mapping[str, float]) -> float:
    return sum(spans[name] for name in whole_spans(spans))


def _authorization(token: str | None) -> dict[str, str]:
    return {} if token is None else {"authorization": f"Bearer {token}"}


def _json(response: httpx.Response) -> object:
    try:
        value: object = json.JSONDecoder().decode(response.text)
    except (ValueError, RecursionError):
        raise WireError(f"the reply is not JSON: {response.text!r:.100}") from None
    return value


def _reason(response: httpx.Response) -> str:
    try:
        value = _json(response)
    except WireError as error:
        return str(error)
    reason = value.get("error") if isinstance(value, dict) else None
    return str(reason if reason is not None else value)[:2000]
