"""The noun `ColdStart`: what a new process takes until a policy's first action, and the memory."""

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qvla_export.shared.errors import ArtifactError, QvlaError
from qvla_export.shared.target import WeightForm

_PATIENCE_S = 1800.0
_STATUS = Path("/proc/self/status")
_LONGEST_MS = 1e9
# A GPU's graphs are captured after the first action of a shape.
_FURTHER_ACTIONS = 2


@dataclass(frozen=True)
class ColdStart:
    """One start: milliseconds, and the memory of a process that holds this policy alone.

    The operating system may have the files in memory still; after booting it has not.

    Raises:
        ArtifactError: a time is not finite or below 0.
    """

    # From starting the process until its engine was loaded: the interpreter, imports, the digests
    # of the bundle, the runtime.
    load_ms: float
    # The first request, from its body to the reply's.
    first_action_ms: float
    # Its resident memory at the highest, and the most that it took of the first GPU's memory where
    # that was looked at: after loading and after each action. None where nobody tells.
    resident_bytes: int | None = None
    device_bytes: int | None = None

    def __post_init__(self) -> None:
        for name, ms in (("load_ms", self.load_ms), ("first_action_ms", self.first_action_ms)):
            if type(ms) not in (int, float) or not 0 <= ms <= _LONGEST_MS:
                raise ArtifactError(f"{name} of a cold start must be a time >= 0, got {ms!r:.60}")
        for size in (self.resident_bytes, self.device_bytes):
            if size is not None and (type(size) is not int or size < 0):
                raise ArtifactError(f"memory of a cold start must be bytes >= 0, got {size!r:.60}")

    @property
    def total_ms(self) -> float:
        """From starting the process to the first action."""
        return self.load_ms + self.first_action_ms

    @classmethod
    def from_json(cls, value: Any) -> "ColdStart":
        """Read the fields of a cold start.

        Raises:
            ArtifactError: they are missing, or no times.
        """
        if not isinstance(value, dict):
            raise ArtifactError(f"a cold start must be an object, got {value!r:.100}")
        known: dict[str, Any] = {part.name: value.get(part.name) for part in fields(cls)}
        return cls(**known)


def measure_cold_starts(
    bundle: Path, count: int, threads: int | None, weights: WeightForm
) -> tuple[ColdStart, ...]:
    """Start so many processes one after the other, each of which acts once.

    Raises:
        QvlaError: a process failed, with what it said last.
    """
    starts = []
    for _ in range(count):
        wanted = [str(bundle), "" if threads is None else str(threads), weights]
        # On Linux all processes share this clock.
        now_ns = str(time.perf_counter_ns())
        done = subprocess.run(
            [sys.executable, "-m", "jetson.latency.cold_start", *wanted, now_ns],
            capture_output=True,
            text=True,
            timeout=_PATIENCE_S,
            check=False,
        )
        if done.returncode:
            said = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
            raise QvlaError(f"a cold start of {bundle} failed: {said[0]}")
        starts.append(ColdStart.from_json(json.loads(done.stdout)))
    return tuple(starts)


def _act_once(bundle: Path, threads: int | None, weights: WeightForm, started_ns: int) -> ColdStart:
    from engines.load import load_engine
    from engines.trt.device_memory import device_memory
    from jetson.board.files import meminfo_bytes, text_of
    from jetson.policy import EnginePolicy
    from jetson.serving.service import ActionService
    from qvla_export.shared.bundle import Bundle

    loaded = Bundle.load(bundle)
    with device_memory() as device, load_engine(loaded, threads, weights) as engine:
        service = ActionService(EnginePolicy(loaded, engine))
        load_ms = (time.perf_counter_ns() - started_ns) / 1e6
        device.look()
        first_action_ms = service.warm_up(1)
        for _ in range(_FURTHER_ACTIONS):
            device.look()
            service.warm_up(1)
        device.look()
        resident_bytes = meminfo_bytes(text_of(_STATUS), "VmHWM")
        return ColdStart(load_ms, first_action_ms, resident_bytes, device.taken_bytes)


if __name__ == "__main__":
    place, cores, form, begun = sys.argv[1:]
    acted = _act_once(Path(place), int(cores) if cores else None, form, int(begun))  # type: ignore[arg-type]  # written above
    sys.stdout.write(json.dumps(asdict(acted)))
