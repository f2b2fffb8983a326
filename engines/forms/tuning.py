"""The noun `Tuning`: which runtime and forms of weights a bundle runs in here, kept beside it.

A choice between forms holds for one bundle on one machine, with one number of threads and the
runtimes that were timed: a file that is of others is not used, and a line says so.
"""

import hashlib
import logging
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import onnxruntime

from engines.forms.float_layers import FloatLayers, form_of
from engines.ort import cpu_description
from engines.trt.sidecar import engine_folder
from qvla_export.shared.artifacts import write_json
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.json_documents import Node, read_json
from qvla_export.shared.target import Runtime

_LOGGER = logging.getLogger(__name__)
_FORMAT = "qvla.tuning/1"
# Runtime -> the package whose version counts. The first computes constants for the second.
PACKAGES: Mapping[Runtime, tuple[str, ...]] = {
    "ort": ("onnxruntime",),
    "openvino": ("onnxruntime", "openvino"),
}


@dataclass(frozen=True)
class TuningKey:
    """What a choice holds for."""

    bundle_digest: str
    # Model, features and cores of the CPU.
    machine: str
    # CPU threads of one operator; None for one a physical core.
    threads: int | None


@dataclass(frozen=True)
class TimedForm:
    """What was measured of one runtime with one form of the weights."""

    # "ort, as stored"
    name: str
    # Of one action; None where it cannot run.
    median_ms: float | None
    p10_ms: float | None
    p90_ms: float | None
    # Of all constants in memory; None where it cannot run.
    resident_bytes: int | None
    # Why it is not taken; empty where it may be.
    refusal: str = ""

    def text(self, float_bytes: int) -> str:
        """Say it in a line, beside the bytes of the float policy."""
        if self.median_ms is None or self.resident_bytes is None:
            return f"{self.name}: {self.refusal}"
        text = (
            f"{self.name}: {self.median_ms:.2f} ms [{self.p10_ms:.2f}, {self.p90_ms:.2f}], "
            f"{self.resident_bytes / 1e6:.2f} MB ({self.resident_bytes / float_bytes:.2f} of float)"
        )
        return f"{text}; not taken: {self.refusal}" if self.refusal else text


@dataclass(frozen=True)
class Tuning:
    """The form that was found fastest, and what was measured of it."""

    key: TuningKey
    runtime: Runtime
    # Package -> version.
    versions: Mapping[str, str]
    # Part -> layers whose weights are float32 in memory; all others are as stored.
    float_layers: FloatLayers
    # Median of one action, and bytes of all constants in memory.
    median_ms: float
    resident_bytes: int
    # The same bytes of the float policy.
    float_bytes: int
    # All forms that were timed, this one among them.
    forms: tuple[TimedForm, ...] = ()

    @property
    def form(self) -> str:
        """Say in words what runs: "openvino, 12 layers in float"."""
        return f"{self.runtime}, {form_of(self.float_layers) or 'as stored'}"

    @property
    def lines(self) -> tuple[str, ...]:
        """Every form in words, then the choice."""
        return (*(f"  {form.text(self.float_bytes)}" for form in self.forms), f"  -> {self.form}")

    def save(self, path: Path) -> None:
        """Write JSON, atomically."""
        layers = {part: sorted(names) for part, names in self.float_layers.items()}
        write_json(path, {"format": _FORMAT, **asdict(self), "float_layers": layers})

    @staticmethod
    def load(path: Path) -> "Tuning":
        """Read what `save` wrote.

        Raises:
            ArtifactError: the file is missing, damaged or of another kind.
        """
        value = Node(read_json(path, "tuning"), str(path), remedy="qvla tune makes it anew")
        if value.field("format").text(40) != _FORMAT:
            raise value.field("format").wrong(f"{_FORMAT!r} is needed")
        key, runtime = value.field("key"), value.field("runtime")
        if runtime.text(20) not in PACKAGES:
            raise runtime.wrong(f"one of {', '.join(PACKAGES)} is needed")
        threads = key.field("threads").whole(1, 4096) if key.has("threads") else None
        layers = value.field("float_layers").fields()
        return Tuning(
            TuningKey(
                key.field("bundle_digest").text(200), key.field("machine").text(200), threads
            ),
            "openvino" if runtime.text() == "openvino" else "ort",
            {name: text.text(60) for name, text in value.field("versions").fields().items()},
            {part: frozenset(n.text(1000) for n in v.elements()) for part, v in layers.items()},
            value.field("median_ms").number(),
            value.field("resident_bytes").whole(),
            value.field("float_bytes").whole(1),
            tuple(_form(node) for node in value.field("forms").elements()),
        )


def _form(node: Node) -> TimedForm:
    median, low, high = (
        node.field(name).number() if node.has(name) else None
        for name in ("median_ms", "p10_ms", "p90_ms")
    )
    size = node.field("resident_bytes").whole() if node.has("resident_bytes") else None
    name, refusal = node.field("name").text(100), node.field("refusal").text(10_000)
    return TimedForm(name, median, low, high, size, refusal)


def tuning_path(bundle: Bundle) -> Path:
    """Return where a bundle's tuning lies: beside it, where its engines do."""
    return engine_folder(bundle) / "tuning.json"


def tuning_key(bundle: Bundle, threads: int | None) -> TuningKey:
    """Return what a choice made now would hold for."""
    return TuningKey(bundle.digest, _machine(), threads)


def runtime_versions(runtime: Runtime) -> dict[str, str]:
    """Return the installed versions that a runtime's times depend on.

    Raises:
        PackageNotFoundError: one is not installed.
    """
    # Of the module: the package is onnxruntime-gpu where that is installed.
    own = {"onnxruntime": onnxruntime.__version__}
    return {name: own[name] if name in own else version(name) for name in PACKAGES[runtime]}


def find_tuning(bundle: Bundle, threads: int | None) -> Tuning | None:
    """Return the tuning of a bundle for this machine; None, and a line why, where none holds.

    Nothing is said where there is no file.
    """
    path = tuning_path(bundle)
    if not path.is_file():
        return None
    try:
        found = Tuning.load(path)
        reason = _foreign(found, tuning_key(bundle, threads))
    except ArtifactError as error:
        reason = str(error)
    if not reason:
        return found
    _LOGGER.warning(
        "%s is not used, weights run as stored: %s; qvla tune %s makes it anew",
        path,
        reason,
        bundle.path,
    )
    return None


def find_any_tuning(bundle: Bundle) -> Tuning | None:
    """Return the tuning of a bundle for this machine, of whatever number of threads."""
    try:
        threads = Tuning.load(tuning_path(bundle)).key.threads
    except ArtifactError:
        threads = None
    return find_tuning(bundle, threads)


def _foreign(found: Tuning, key: TuningKey) -> str:
    """Say what a tuning does not share with here; nothing where it holds."""
    for name, here in asdict(key).items():
        there = getattr(found.key, name)
        if there != here:
            return f"its {name.replace('_', ' ')} is {there}, here it is {here}"
    try:
        versions = runtime_versions(found.runtime)
    except PackageNotFoundError as error:
        return f"{error.name} is not installed"
    if found.versions != versions:
        return f"it was made with {dict(found.versions)}, here is {versions}"
    return ""


def _machine() -> str:
    """Say which CPU this is: model, digest of its features, cores."""
    lines = (line.partition(":") for line in cpu_description().splitlines())
    values = {key.strip(): value.strip() for key, _, value in lines}
    model = values.get("model name") or platform.processor() or platform.machine()
    features = values.get("flags", values.get("Features", ""))
    digest = hashlib.sha256(features.encode()).hexdigest()[:12]
    return f"{model}, features {digest}, {os.cpu_count()} cores"
