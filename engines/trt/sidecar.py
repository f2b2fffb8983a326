"""The noun `Sidecar`: what is known about one engine, in a sealed JSON file beside it."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from engines.trt.seal import UnsealedEngine, read_sealed, write_sealed
from engines.trt.shapes import ShapeRange, ranges_from_json, ranges_to_json
from qvla_export.shared.artifacts import require_fields
from qvla_export.shared.bundle import Bundle

FORMAT = "qvla-engine-1"
REMEDY = "build it on this machine: qvla build BUNDLE"


@dataclass(frozen=True)
class Origin:
    """What an engine was made from and how; equal origins need no second build."""

    target: str
    part: str
    bundle_digest: str
    # SHA-256 of the part's graph and of its weights file.
    model_sha256: str
    weights_sha256: str
    # "tensorrt_rtx", "1.7.1.116".
    module: str
    module_version: str
    # What it was built for, "sm_89".
    compute_capability: str | None
    # Name of the GPU whose kernels were timed; None where building asks no GPU.
    gpu: str | None
    level: int
    workspace_bytes: int
    # Input name -> shapes, in the first run of the program that calls the part.
    inputs: dict[str, ShapeRange]
    # The same in each later one: a profile each.
    later: tuple[dict[str, ShapeRange], ...] = ()

    @property
    def profiles(self) -> tuple[dict[str, ShapeRange], ...]:
        """Return the input shapes of each of the engine's profiles."""
        return (self.inputs, *self.later)


# Field of `Origin` -> its key on disk, where a part is called a stage.
_ORIGIN_KEYS = {name: "stage" if name == "part" else name for name in Origin.__dataclass_fields__}


@dataclass(frozen=True)
class Sidecar:
    """An engine's origin, contents and digest."""

    origin: Origin
    # Of all profiles together.
    outputs: dict[str, ShapeRange]
    engine_sha256: str
    engine_bytes: int
    # Bytes of weights in it, by the builder's own account; None if it gave none.
    weights_bytes: int | None
    # Jetson's power mode while kernels were timed.
    power_mode: str | None
    # SHA-256 of the timing cache after the build; None without one.
    timing_cache_sha256: str | None
    # Layers after fusion, as the engine inspector lists them; or why there is no list.
    layers: list[Any] | None
    layers_missing: str | None

    def save(self, path: Path) -> None:
        """Write the sidecar with this machine's seal."""
        fields = {**asdict(self.origin), "inputs": ranges_to_json(self.origin.inputs)}
        fields["later"] = [ranges_to_json(inputs) for inputs in self.origin.later]
        origin = {_ORIGIN_KEYS[name]: value for name, value in fields.items()}
        write_sealed(
            path,
            {
                "format": FORMAT,
                **asdict(replace(self, outputs={})),
                "origin": origin,
                "outputs": ranges_to_json(self.outputs),
            },
        )

    @staticmethod
    def load(path: Path) -> "Sidecar":
        """Read a sidecar that this machine made.

        Raises:
            ArtifactError: it is missing, damaged or of another format.
            UnsealedEngine: it comes from elsewhere.
        """
        value = read_sealed(path, "engine sidecar", REMEDY)
        if value.pop("format", None) != FORMAT:
            raise UnsealedEngine(f"{path} must be of format {FORMAT!r}; {REMEDY}")
        require_fields(value, Sidecar.__dataclass_fields__, f"engine sidecar {path}")
        if isinstance(value["origin"], dict):
            value["origin"].setdefault("later", [])  # absent in those of before
        require_fields(value["origin"], _ORIGIN_KEYS.values(), f"engine sidecar {path}")
        origin = {name: value["origin"][key] for name, key in _ORIGIN_KEYS.items()}
        origin["inputs"] = ranges_from_json(origin["inputs"])
        origin["later"] = tuple(ranges_from_json(inputs) for inputs in origin["later"])
        value |= {"origin": Origin(**origin), "outputs": ranges_from_json(value["outputs"])}
        return Sidecar(**value)


def engine_path(folder: Path, part: str) -> Path:
    """Return where a part's engine lies."""
    return folder / f"{part}.engine"


def sidecar_path(folder: Path, part: str) -> Path:
    """Return where what is known about it lies."""
    return folder / f"{part}.json"


def engine_folder(bundle: Bundle) -> Path:
    """Return where a bundle's engines lie unless told otherwise: beside it, by target."""
    return bundle.path.absolute().parent / "engines" / bundle.target
