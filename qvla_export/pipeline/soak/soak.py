"""Attack a server and a control loop for hours; every chance is drawn from one seed."""

import contextlib
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx

from jetson.clients.protocol_clients import ProtocolName
from jetson.recording.reader import Recording
from jetson.serving.security import TlsFiles, client_tls
from qvla_export.pipeline.progress import OnProgress, Progress, ignore
from qvla_export.pipeline.soak.attacker_process import AttackerProcess, attacker_process
from qvla_export.pipeline.soak.attacks import ATTACKS
from qvla_export.pipeline.soak.control import ControlRun, control_run
from qvla_export.pipeline.soak.good_clients import GoodClients
from qvla_export.pipeline.soak.report import (
    ENGINE_FAULTS,
    MOST_DESCRIPTORS,
    QUIET,
    QUIET_AGAIN,
    STOPPED,
    Sample,
    SoakReport,
)
from qvla_export.pipeline.soak.server_process import ServerProcess, server_process
from qvla_export.pipeline.soak.tally import Tally
from qvla_export.shared.errors import QvlaError

DRIVER_STOPPED, DISK_FULL = "driver stopped", "disk full"
_PHASES = (QUIET, *ATTACKS, ENGINE_FAULTS, STOPPED, DRIVER_STOPPED)
_LONGEST_PHASE_S = 120.0
_WARM_UP, _WARM_UP_S = "warm-up", 1.0
# What /readyz says of a recorder that stopped.
_NOT_RECORDED = "nothing is recorded any more"
_SAMPLE_S = 1.0
_SETTLE_S = 30.0
_GOOD_RATE_HZ = 20.0
_LONGEST_STOP_S = 1.0
_READY_TIMEOUT_S = 60.0
# A shorter one has no room for its phases.
_LEAST_HOURS = 12.0 / 3600.0


@dataclass(frozen=True)
class SoakPlan:
    """How long to attack, and with what chances.

    Raises:
        QvlaError: it is too short.
    """

    hours: float
    seed: int = 0
    # Encrypts HTTP and websockets; clients trust this certificate, which must be 127.0.0.1's.
    tls: TlsFiles | None = None

    def __post_init__(self) -> None:
        if not self.hours >= _LEAST_HOURS:
            raise QvlaError(
                f"--hours must be at least {_LEAST_HOURS:.4f} (12 s), got {self.hours:g}"
            )

    @property
    def phases(self) -> list[str]:
        """Return all phases in order: rounds of attacks, the disk full at the end of the first."""
        seconds = self.hours * 3600.0
        rounds = max(1, round(seconds / (_LONGEST_PHASE_S * len(_PHASES))))
        return [*_PHASES, DISK_FULL, *(_PHASES * (rounds - 1)), QUIET_AGAIN]


def run_soak(plan: SoakPlan, on_progress: OnProgress = ignore) -> SoakReport:
    """Run all phases against a server and a control loop of their own; return what came of it.

    Good clients ask in every protocol, all the time. The disk is full by a limit that the kernel
    puts on the size of the server's files (RLIMIT_FSIZE), so that nothing else runs out of space.

    Raises:
        QvlaError: this is no Linux, the server does not start, or the soak itself fails.
    """
    if sys.platform != "linux":
        raise QvlaError(
            f"a soak looks at its server by Linux's /proc and limits it by prlimit, this is "
            f"{sys.platform}; run it on a robot or another machine with Linux"
        )
    cores = sorted(os.sched_getaffinity(0))
    core = cores[-1] if len(cores) > 1 else None
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qvla-soak-")))
        if core is not None:
            os.sched_setaffinity(0, cores[:-1])
            stack.callback(os.sched_setaffinity, 0, cores)
        if plan.tls is not None:
            stack.enter_context(_trusting(plan.tls.certificate))
        server = stack.enter_context(server_process(folder, plan.seed, plan.tls))
        attacker = stack.enter_context(attacker_process(server.address, core))
        control = stack.enter_context(control_run(server.address, plan.seed, folder))
        good = stack.enter_context(GoodClients(server.address, _GOOD_RATE_HZ))
        soak = _Soak(plan, server, attacker, control, good)
        soak.run(on_progress)
    where = "shares the only core" if core is None else f"on core {core}, the rest on the others"
    return SoakReport(
        hours=(time.monotonic() - soak.start_s) / 3600.0,
        seed=plan.seed,
        attacker=where,
        encrypted=plan.tls is not None,
        good={key: tally for key, tally in good.tallies.items() if key[0] != _WARM_UP},
        attacks=soak.attacks,
        samples=soak.samples,
        commands=soak.commands,
        faults=soak.faults,
        has_own_core=core is not None,
    )


class _Soak:
    """What the phases share."""

    def __init__(
        self,
        plan: SoakPlan,
        server: ServerProcess,
        attacker: AttackerProcess,
        control: ControlRun,
        good: GoodClients,
    ) -> None:
        self.start_s = time.monotonic()
        self.attacks: dict[tuple[str, ProtocolName], Tally] = {}
        self.samples: list[Sample] = []
        self.faults: list[str] = []
        self._server, self._attacker = server, attacker
        self._control, self._good = control, good
        self._plan = plan
        self._rng = random.Random(plan.seed)
        self._sample_every_s = max(_SAMPLE_S, plan.hours * 3.6)
        self._is_recording = True
        self._http = httpx.Client(
            base_url=server.address.http.url("http"),
            timeout=_READY_TIMEOUT_S,
            trust_env=False,
            verify=client_tls() or True,
        )

    def run(self, on_progress: OnProgress) -> None:
        """Run everything and end the processes."""
        phases = self._plan.phases
        seconds = self._plan.hours * 3600.0 / len(phases)
        with self._http:
            self._good.begin(_WARM_UP)
            for attack in ATTACKS:
                # Once: what is loaded on first use is no leak.
                self._attacker.begin(attack, 0.0, self._rng.randrange(1 << 32))
                self._attacker.finish(0.0)
            self._wait(_WARM_UP_S)
            for number, phase in enumerate(phases):
                on_progress(Progress(f"soak, {phase}", number, len(phases)))
                self._check_readiness(phase)
                self._good.begin(phase)
                self._good.await_answers()
                self._phase(phase, seconds)
                self._good.await_answers()
                if phase == QUIET and number == 0:
                    self.samples[:] = [self._sample()]
            self._settle()
        self._good.stop()
        self.commands, faults = self._control.end()
        self.faults += faults
        self.faults += self._server.end()
        self._check_recording()

    def _phase(self, phase: str, seconds: float) -> None:
        if phase in ATTACKS:
            self._attack(phase, seconds)
        elif phase == ENGINE_FAULTS:
            self._server.failing.value = 1
            self._wait(seconds)
            self._server.failing.value = 0
        elif phase == STOPPED:
            self._repeat(
                lambda: self._server.pause(self._rng.uniform(0.05, _LONGEST_STOP_S)), seconds
            )
        elif phase == DRIVER_STOPPED:
            self._repeat(self._control.pause_one, seconds)
        else:
            if phase == DISK_FULL:
                self._server.fill_disk()
                self._await_full_disk()
            self._wait(seconds)

    def _attack(self, attack: str, seconds: float) -> None:
        self._attacker.begin(attack, seconds, self._rng.randrange(1 << 32))
        self._wait(seconds)
        for protocol, tally in self._attacker.finish(seconds).items():
            self.attacks.setdefault((attack, protocol), Tally()).add(tally)

    def _repeat(self, act: Callable[[], None], seconds: float) -> None:
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            act()
            self._wait(0.3)

    def _wait(self, seconds: float) -> None:
        """Let time pass, and look at the server now and then."""
        end_s = time.monotonic() + seconds
        while (left_s := end_s - time.monotonic()) > 0:
            time.sleep(min(left_s, _SAMPLE_S))
            latest_s = self.samples[-1].seconds if self.samples else -self._sample_every_s
            if time.monotonic() - self.start_s - latest_s >= self._sample_every_s:
                self.samples.append(self._sample())

    def _sample(self) -> Sample:
        if not self._server.is_alive:
            raise QvlaError(f"the server died: {self._server.end()}")
        server = self._server
        seconds = time.monotonic() - self.start_s
        return Sample(seconds, server.resident_bytes(), server.descriptors())

    def _settle(self) -> None:
        """Wait until the kernel has told the server who is gone."""
        end_s, most = time.monotonic() + _SETTLE_S, self.samples[0].descriptors + MOST_DESCRIPTORS
        while self._server.descriptors() > most and time.monotonic() < end_s:
            self._wait(_SAMPLE_S)
        self.samples.append(self._sample())

    def _readiness(self) -> str:
        """Return what /readyz says is wrong; empty where nothing is."""
        if self._http.get("/healthz").status_code != 200:
            return "it is not alive"
        reply = self._http.get("/readyz")
        return "" if reply.status_code == 200 else ", ".join(reply.json()["not_ready"])

    def _check_readiness(self, phase: str) -> None:
        said = self._readiness()
        expected = "" if self._is_recording else _NOT_RECORDED
        if said != expected:
            self.faults.append(f"before {phase!r} the server said {said!r}, not {expected!r}")

    def _await_full_disk(self) -> None:
        self._is_recording = False
        end_s = time.monotonic() + _READY_TIMEOUT_S
        while self._readiness() != _NOT_RECORDED:
            if time.monotonic() > end_s:
                self.faults.append("the disk was full, and /readyz did not say so")
                return
            self._wait(0.2)

    def _check_recording(self) -> None:
        """A recording that was cut by a full disk is read up to there."""
        try:
            moment = next(Recording(self._server.recording).moments(), None)
        except QvlaError as error:
            self.faults.append(f"the recording on the full disk cannot be read: {error}")
        else:
            if moment is None:
                self.faults.append("the recording on the full disk holds nothing")


@contextlib.contextmanager
def _trusting(certificate: Path) -> Iterator[None]:
    """Let clients of this process and those it starts trust a certificate."""
    before = os.environ.get("QVLA_TLS_CA")
    os.environ["QVLA_TLS_CA"] = str(certificate)
    try:
        yield
    finally:
        if before is None:
            del os.environ["QVLA_TLS_CA"]
        else:
            os.environ["QVLA_TLS_CA"] = before
