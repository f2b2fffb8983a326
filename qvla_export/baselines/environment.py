"""The environment the libraries live in: their pins are not ours, and the core needs none of them.

Its Python borrows torch and all else from QVLA's environment (`make baselines-env`).
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from qvla_export.baselines.baseline import Baseline
from qvla_export.baselines.methods import METHODS, BaselineRequest
from qvla_export.baselines.quantized import Calibration, Quantized
from qvla_export.shared.errors import QvlaError

_REMEDY = "make it with: make baselines-env (pinned in constraints-baselines.txt)"
_WORKER = "qvla_export.pipeline.baseline_worker"
# Lines and characters of a failed library's messages that are kept.
_LINES, _LAST = 40, 800
# What `block_line` returns.
_BLOCK = re.compile(r"\S+: block (?P<done>\d+) of (?P<total>\d+)")


@dataclass(frozen=True)
class BaselineJob:
    """What the environment is asked to do; written to a file for it."""

    request: BaselineRequest
    # Folders of the checkpoint, the calibration set and the baseline to write.
    checkpoint: str
    calibration: str
    output: str
    unnorm_key: str | None = None
    preset: str | None = None

    def to_json(self) -> str:
        """Return what the worker reads."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "BaselineJob":
        """Read what `to_json` wrote."""
        value = json.loads(text)
        return BaselineJob(**{**value, "request": BaselineRequest(**value["request"])})


@dataclass(frozen=True)
class BaselineEnvironment:
    """A virtual environment with the libraries."""

    folder: Path

    def python(self) -> Path:
        """Return its Python.

        Raises:
            QvlaError: it is missing; with the remedy.
        """
        python = self.folder.absolute() / "bin" / "python"
        if not python.is_file():
            raise QvlaError(f"no environment of baseline libraries at {self.folder}; {_REMEDY}")
        return python

    def run(
        self, job: BaselineJob, on_progress: Callable[[int, int], None] | None = None
    ) -> Baseline:
        """Quantize in it.

        Args:
            job: what to do, and where to write it.
            on_progress: called with (blocks done, blocks in all).

        Raises:
            QvlaError: the environment is missing or lacks the library, or the library failed;
                the message has the remedy, or the last lines.
        """
        python = self.python()
        # Where this package is: an editable install is not seen through another's site-packages.
        root = str(Path(__file__).parents[2])
        with tempfile.NamedTemporaryFile("w") as file:
            file.write(job.to_json())
            file.flush()
            worker = subprocess.Popen(
                [str(python), "-m", _WORKER, file.name],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env={**os.environ, "PYTHONPATH": root, "TOKENIZERS_PARALLELISM": "false"},
            )
            last_words = _wait(worker, on_progress)
        if worker.returncode:
            raise QvlaError(f"{job.request.setting} failed in {self.folder}: {last_words[-_LAST:]}")
        return Baseline.load(Path(job.output))


def block_line(setting: str, done: int, total: int) -> str:
    """Return the line by which a worker tells how far it is."""
    return f"{setting}: block {done} of {total}"


def _wait(worker: "subprocess.Popen[str]", on_progress: Callable[[int, int], None] | None) -> str:
    """Wait for a worker, telling how far it is; return the last lines it wrote.

    Libraries say much of their own; it matters when they fail.
    """
    assert worker.stdout is not None
    last: deque[str] = deque(maxlen=_LINES)
    with worker:
        for line in worker.stdout:
            last.append(line)
            block = _BLOCK.fullmatch(line.strip())
            if block is not None and on_progress is not None:
                on_progress(int(block["done"]), int(block["total"]))
    return "".join(last)


def require_library(method: str) -> dict[str, str]:
    """Return the versions of a method's library, here.

    Raises:
        QvlaError: it is not installed; with the remedy.
    """
    known = METHODS[method]
    if importlib.util.find_spec(known.library) is None:
        raise QvlaError(f"this environment has no {known.distributions[0]}; {_REMEDY}")
    return {name: importlib.metadata.version(name) for name in known.distributions}


def run_library(calibration: Calibration) -> Quantized:
    """Quantize with the library of the request's method; it must be installed here."""
    library = METHODS[calibration.request.method].library
    if library == "modelopt":
        from qvla_export.baselines.by_modelopt import quantize
    elif library == "llmcompressor":
        from qvla_export.baselines.by_llmcompressor import quantize
    elif library == "auto_round":
        from qvla_export.baselines.by_auto_round import quantize
    else:
        from qvla_export.baselines.by_action import quantize
    return quantize(calibration)
