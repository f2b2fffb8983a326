"""The noun `Bundle`: a folder with everything a robot needs to act, each file vouched for.

manifest.json, one graph `<part>.onnx` a part with its weights `<part>.onnx.data`,
golden.safetensors, tokenizer.json for a policy that reads and plan.json for a quantized one. Where
parts repeat, the manifest holds a program; without one they run once each, in order. The robot
imports this module: no torch, no onnx. `qvla_export.graph.bundle_writer` writes it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from qvla_export.shared.artifacts import GOLDEN as GOLDEN
from qvla_export.shared.artifacts import MANIFEST as MANIFEST
from qvla_export.shared.artifacts import PLAN as PLAN
from qvla_export.shared.artifacts import TOKENIZER as TOKENIZER
from qvla_export.shared.artifacts import read_json, require_fields, sha256_file
from qvla_export.shared.errors import ArtifactError, ArtifactMismatch
from qvla_export.shared.external_data import external_tensors
from qvla_export.shared.json_documents import Node
from qvla_export.shared.part import (
    CHOSEN_TOKENS,
    Part,
    TensorSpec,
    part_from_json,
    specs_from_json,
)
from qvla_export.shared.processor import Processor, load_tokenizer
from qvla_export.shared.processor_json import processor_from_json
from qvla_export.shared.program import Program, ProgramError, program_from_json
from qvla_export.shared.program_check import require_runnable

# Parts that run once each, in order; and with a program, which older versions would not obey.
FORMAT, PROGRAM_FORMAT = "qvla-bundle-2", "qvla-bundle-3"
_FIELDS = (
    "target",
    "policy_digest",
    "plan",
    "inputs",
    "outputs",
    "stages",
    "processor",
    "engine_options",
    "weight_bytes",
    "versions",
    "files",
)
_REMEDY = "copy the bundle again or export it anew"


@dataclass(frozen=True)
class Golden:
    """Held-out model inputs and the actions that torch computes for them."""

    # Named model inputs of each observation, batch size 1.
    feeds: tuple[Mapping[str, NDArray[Any]], ...]
    # Normalized actions of torch with the bundle's quantized weights.  float32 [n, horizon, dim]
    reference: NDArray[np.float32]
    # The same of the full-precision policy.  float32 [n, horizon, dim]
    full_precision: NDArray[np.float32]


@dataclass(frozen=True)
class Bundle:
    """A verified bundle on disk."""

    path: Path
    processor: Processor = field(repr=False)
    # What an observation becomes, and what the last part makes of it.
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parts: tuple[Part, ...]
    # How they run.
    program: Program
    # The whole manifest, as read.
    manifest: Mapping[str, Any] = field(repr=False)

    def __repr__(self) -> str:
        plan = self.plan
        bits = "float" if plan is None else f"{plan['mean_bits_per_channel']:.2f} mean bits"
        size = f"{self.nbytes / 1e6:.2f} MB"
        return f"<Bundle for {self.target}: {bits}, {size}, {self.digest[:12]} -> {self.path}>"

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, which holds the SHA-256 of every file."""
        return str(self.manifest["digest"])

    @property
    def target(self) -> str:
        """Name of the target the graph was made for."""
        return str(self.manifest["target"])

    @property
    def policy_digest(self) -> str:
        """SHA-256 of the checkpoint it was made from."""
        return str(self.manifest["policy_digest"])

    @property
    def plan(self) -> Mapping[str, Any] | None:
        """Averages, budget and digest of the plan; None for the float policy."""
        plan: Mapping[str, Any] | None = self.manifest["plan"]
        return plan

    @property
    def weight_bytes(self) -> Mapping[str, int]:
        """Bytes of the graph's constants by kind; see `BundleContents`."""
        nbytes: Mapping[str, int] = self.manifest["weight_bytes"]
        return nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of the model: graphs and weights, without tokenizer and golden observations."""
        return sum(
            int(entry["bytes"])
            for name, entry in self.manifest["files"].items()
            if name.endswith((".onnx", ".onnx.data"))
        )

    @property
    def engine_options(self) -> Mapping[str, Any]:
        """What the engine must be set to for the golden actions to hold."""
        options: Mapping[str, Any] = self.manifest["engine_options"]
        return options

    @property
    def reads(self) -> Mapping[str, tuple[str, ...]]:
        """Part name -> names of its inputs."""
        return {part.name: tuple(spec.name for spec in part.inputs) for part in self.parts}

    def model_path(self, part: Part) -> Path:
        """Return the path of a part's graph; its weights lie beside it."""
        return self.path / part.model

    def golden(self) -> Golden:
        """Read the golden observations and reference actions."""
        try:
            tensors = load_file(self.path / GOLDEN)
            reference = tensors.pop("reference")
            full_precision = tensors.pop("full_precision")
            if reference.ndim != 3 or reference.shape != full_precision.shape:
                raise ValueError(f"its actions are {reference.shape} and {full_precision.shape}")
            feeds: list[dict[str, NDArray[Any]]] = [{} for _ in reference]
            for key, tensor in tensors.items():
                index, name = key.split("/", 1)
                feeds[int(index)][name] = tensor
        except (SafetensorError, KeyError, OSError, ValueError, IndexError) as error:
            raise ArtifactError(f"{self.path / GOLDEN} is damaged: {error}; {_REMEDY}") from error
        return Golden(tuple(feeds), reference, full_precision)

    @staticmethod
    def load(path: Path) -> "Bundle":
        """Open a bundle and verify every file.

        Raises:
            ArtifactError: the folder, its format or a file is not what the manifest says; the
                message names the file, the expected and the found digest.
        """
        if not path.is_dir():
            raise ArtifactError(f"bundle folder not found: {path}; qvla export makes one")
        manifest = _read_manifest(path / MANIFEST)
        try:
            parts = tuple(part_from_json(value) for value in manifest["stages"])
            _verify_files(path, manifest["files"], {part.model for part in parts})
            for part in parts:
                _verify_external_data(path, part.model, manifest["files"])
            tokenizer = load_tokenizer(path / TOKENIZER) if TOKENIZER in manifest["files"] else None
            bundle = Bundle(
                path=path,
                processor=processor_from_json(manifest["processor"], tokenizer),
                inputs=specs_from_json(manifest["inputs"]),
                outputs=specs_from_json(manifest["outputs"]),
                parts=parts,
                program=_program(manifest, parts),
                manifest=manifest,
            )
            require_runnable(bundle.program, parts, bundle.inputs, bundle.outputs)
            _require_history(bundle)
            return bundle
        except (AttributeError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"the manifest of {path} lacks or misstates {error}; {_REMEDY}"
            ) from error


def _require_history(bundle: Bundle) -> None:
    """Refuse a policy whose prompts would repeat what its graphs do not put out.

    Raises:
        ArtifactError: it is one.
    """
    named = CHOSEN_TOKENS in {spec.name for spec in bundle.outputs}
    if bundle.processor.spec.history is not None and not named:
        raise ArtifactError(
            f"{bundle.path}: the policy's prompt repeats the tokens of the step before, and no "
            f"graph puts out {CHOSEN_TOKENS!r}; {_REMEDY}"
        )


def _read_manifest(path: Path) -> Mapping[str, Any]:
    manifest = read_json(path, "bundle manifest")
    formats = (FORMAT, PROGRAM_FORMAT)
    if not isinstance(manifest, dict) or manifest.get("format") not in formats:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise ArtifactError(
            f"{path} must be of format {' or '.join(map(repr, formats))}, got {found!r}; "
            "export the bundle with this version"
        )
    stated = manifest.get("digest")
    found = manifest_digest({key: value for key, value in manifest.items() if key != "digest"})
    if stated != found:
        raise ArtifactMismatch(_damage_message(path, str(stated), found))
    require_fields(manifest, _FIELDS, f"bundle manifest {path}")
    _require_kinds(Node(manifest, str(path), remedy=_REMEDY))
    return manifest


def _require_kinds(manifest: Node) -> None:
    """Refuse fields of another kind than whoever reads them expects.

    Raises:
        ArtifactError: naming the first.
    """
    manifest.field("target").text(200)
    manifest.field("policy_digest").text(200)
    if manifest.has("plan"):
        manifest.field("plan").field("mean_bits_per_channel").number()
    for name in ("engine_options", "versions"):
        manifest.field(name).fields()
    for size in manifest.field("weight_bytes").fields().values():
        size.whole()
    for entry in manifest.field("files").fields().values():
        entry.field("bytes").whole()
        entry.field("sha256").text(200)


def _program(manifest: Mapping[str, Any], parts: Sequence[Part]) -> Program:
    if manifest["format"] == FORMAT:
        if "program" in manifest:
            raise ProgramError(f"format {FORMAT!r} has no program, the manifest does; {_REMEDY}")
        return Program.straight(part.name for part in parts)
    if "program" not in manifest:
        raise ProgramError(f"the manifest lacks its program; {_REMEDY}")
    return program_from_json(manifest["program"])


def _verify_files(folder: Path, files: Mapping[str, Mapping[str, Any]], models: set[str]) -> None:
    if missing := sorted({GOLDEN, *models} - set(files)):
        raise ArtifactError(f"the manifest of {folder} does not list {missing}; {_REMEDY}")
    present = {path.name for path in folder.iterdir()} - {MANIFEST}
    if extra := sorted(present - set(files)):
        raise ArtifactError(
            f"{folder} holds {[name[:80] for name in extra[:8]]}, which its manifest does not "
            "list; move them elsewhere, or copy the bundle again"
        )
    for name, entry in files.items():
        parts = PurePosixPath(name).parts
        if "\\" in name or len(parts) != 1 or parts[0] in ("..", "/"):
            raise ArtifactError(
                f"a bundle's files must lie in its folder, its manifest names {name!r}; "
                "do not use this bundle"
            )
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise ArtifactError(f"bundle file {path} is missing or a link; {_REMEDY}")
        if path.stat().st_size != entry["bytes"]:
            raise ArtifactMismatch(
                f"{path} is damaged: expected {entry['bytes']} bytes, found "
                f"{path.stat().st_size}; {_REMEDY}"
            )
        found = sha256_file(path)
        if found != entry["sha256"]:
            raise ArtifactMismatch(_damage_message(path, str(entry["sha256"]), found))


def _verify_external_data(folder: Path, model: str, files: Mapping[str, Any]) -> None:
    """Refuse a graph that reads another file than those that the manifest vouches for.

    Raises:
        ArtifactError: it does, or reads behind a file's end.
    """
    for tensor in external_tensors(folder / model):
        entry = files.get(tensor.location)
        if entry is None or tensor.location == MANIFEST:
            raise ArtifactError(
                f"the graph {folder / model} reads weights from {tensor.location!r:.200}, which "
                "its manifest does not list; do not use this bundle"
            )
        if tensor.offset + tensor.length > int(entry["bytes"]):
            raise ArtifactError(
                f"the graph {folder / model} reads {tensor.name!r:.80} behind the end of "
                f"{tensor.location}; {_REMEDY}"
            )


def _damage_message(path: Path, expected: str, found: str) -> str:
    return f"{path} is damaged: expected SHA-256 {expected}, found {found}; {_REMEDY}"


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a manifest that has no digest of its own yet."""
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
