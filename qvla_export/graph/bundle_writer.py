"""Write a bundle: whole or not at all."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from qvla_export.shared.artifacts import new_folder, sha256_file, versions, write_json
from qvla_export.shared.bundle import (
    FORMAT,
    GOLDEN,
    MANIFEST,
    PLAN,
    PROGRAM_FORMAT,
    TOKENIZER,
    Bundle,
    Golden,
    manifest_digest,
)
from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.part import Part, TensorSpec
from qvla_export.shared.processor import Processor
from qvla_export.shared.processor_json import processor_to_json
from qvla_export.shared.program import Program, program_to_json


@dataclass(frozen=True)
class BundleContents:
    """What `write_bundle` puts into a bundle beside the graphs."""

    target: str
    processor: Processor
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parts: tuple[Part, ...]
    program: Program
    golden: Golden
    # SHA-256 of the policy's checkpoint.
    policy_digest: str
    # Bytes of the graphs' constants: planned layers by kind, everything else as "rest".
    weight_bytes: Mapping[str, int]
    # Averages and budget of the plan; None for the float policy.
    plan: Mapping[str, Any] | None = None
    # What the engine must be set to for the golden actions to hold.
    engine_options: Mapping[str, Any] = field(default_factory=dict)


def write_bundle(
    path: Path, contents: BundleContents, save_files: Callable[[Path], None]
) -> Bundle:
    """Write a bundle whole or not at all, replacing one at `path`.

    Args:
        path: the folder.
        contents: what the manifest says.
        save_files: writes each part's graph and weights and, of a quantized policy, `PLAN` into a
            folder.

    Raises:
        CheckpointError: the policy reads and has no tokenizer.
    """
    tokenizer = contents.processor.tokenizer
    if tokenizer is None and contents.processor.spec.language != "none":
        raise CheckpointError(
            "a bundle needs the policy's tokenizer; add tokenizer.json to the checkpoint"
        )
    with new_folder(path) as folder:
        save_files(folder)
        if tokenizer is not None:
            tokenizer.save(str(folder / TOKENIZER))
        save_file(_golden_tensors(contents.golden), folder / GOLDEN)
        write_json(folder / MANIFEST, _manifest(folder, contents))
    return Bundle.load(path)


def _manifest(folder: Path, contents: BundleContents) -> dict[str, Any]:
    files = {
        file.name: {"sha256": sha256_file(file), "bytes": file.stat().st_size}
        for file in sorted(folder.iterdir())
    }
    plan = None if contents.plan is None else {**contents.plan, "digest": files[PLAN]["sha256"]}
    straight = contents.program == Program.straight(part.name for part in contents.parts)
    manifest: dict[str, Any] = {
        "format": FORMAT if straight else PROGRAM_FORMAT,
        "target": contents.target,
        "policy_digest": contents.policy_digest,
        "plan": plan,
        "inputs": [asdict(spec) for spec in contents.inputs],
        "outputs": [asdict(spec) for spec in contents.outputs],
        "stages": [asdict(part) for part in contents.parts],
        "processor": processor_to_json(contents.processor),
        "engine_options": dict(contents.engine_options),
        "weight_bytes": dict(contents.weight_bytes),
        "versions": versions(),
        "files": files,
    }
    if not straight:
        manifest["program"] = program_to_json(contents.program)
    return {**manifest, "digest": manifest_digest(manifest)}


def _golden_tensors(golden: Golden) -> dict[str, NDArray[Any]]:
    tensors: dict[str, NDArray[Any]] = {
        f"{index:03d}/{name}": np.ascontiguousarray(tensor)
        for index, feeds in enumerate(golden.feeds)
        for name, tensor in feeds.items()
    }
    tensors["reference"] = np.ascontiguousarray(golden.reference)
    tensors["full_precision"] = np.ascontiguousarray(golden.full_precision)
    return tensors
