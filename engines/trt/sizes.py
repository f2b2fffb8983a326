"""The noun `BundleSizes`: what a plan promises, what the graph stores, what the engine holds.

An engine's bytes are weights and code. Code grows with the kinds of kernels, not with the weights:
0.1 MB for a chain of equal layers, 5 to 10 MB for the reference policy, 23 MB where every layer has
every width (TensorRT for RTX 1.7.1). For a small policy that is more than the weights, so engines
are compared with plans by their weights: what the builder itself counts ("Total Weights Memory"). A
test shows what the figure is worth: flipping a bit in every byte of every constant changes just as
many bytes of the engine as the constants have, and the builder's figure is those plus at most 2 KB.
Weights that were unpacked or stored twice would show.

The other way, building with STRIP_PLAN and taking the difference, needs a GPU: TensorRT for RTX
compiles refittable engines at once.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from engines.trt.sidecar import Sidecar
from qvla_export.shared.bundle import Bundle


@dataclass(frozen=True)
class BundleSizes:
    """Bytes of one bundle's weights, from promise to engine."""

    name: str
    target: str
    # Planned layers by the target's containers, or float layers as stored, and the rest.
    planned_bytes: int
    # Constants of the graphs.
    onnx_bytes: int
    # The same layers in float16, and the rest.
    float16_bytes: int
    # Engine files, and the weights in them; None where no engine is built, or nothing counted.
    engine_bytes: int | None
    engine_weight_bytes: int | None
    # Module and version that built it.
    built_by: str | None = None
    # Why there is no engine.
    engine_missing: str | None = None
    # Forms of its weights in memory here, with their times, in lines; empty where not tuned.
    forms: tuple[str, ...] = ()

    @property
    def engine_error(self) -> float | None:
        """Weights of the engine against the plan's: 0.1 is a tenth more than promised."""
        if self.engine_weight_bytes is None:
            return None
        return self.engine_weight_bytes / self.planned_bytes - 1

    @property
    def ratio(self) -> float:
        """Weights of the engine, or of the graph where there is none, against float16."""
        found = self.engine_weight_bytes
        return (self.onnx_bytes if found is None else found) / self.float16_bytes

    def to_json(self) -> dict[str, Any]:
        """Return all fields and ratios."""
        return {**asdict(self), "engine_error": self.engine_error, "ratio": self.ratio}


def measure_sizes(
    bundle: Bundle, sidecars: Sequence[Sidecar] | None, missing: str | None = None
) -> BundleSizes:
    """Return the sizes of a bundle.

    Args:
        bundle: verified by `Bundle.load`.
        sidecars: of its engines; None if there are none.
        missing: why there are none.
    """
    parts = bundle.weight_bytes
    rest, stored = parts["rest"], sum(parts.values())
    plan = bundle.plan
    counted = [sidecar.weights_bytes for sidecar in sidecars or ()]
    first = sidecars[0].origin if sidecars else None
    known = [nbytes for nbytes in counted if nbytes is not None]
    return BundleSizes(
        # settings/w4/bundle is known by its setting.
        name=bundle.path.absolute().parent.name,
        target=bundle.target,
        planned_bytes=stored if plan is None else int(plan["weight_bytes"]) + rest,
        onnx_bytes=stored,
        float16_bytes=stored if plan is None else int(plan["float16_bytes"]) + rest,
        engine_bytes=None if sidecars is None else sum(s.engine_bytes for s in sidecars),
        engine_weight_bytes=sum(known) if known and len(known) == len(counted) else None,
        built_by=None if first is None else f"{first.module} {first.module_version}",
        engine_missing=missing,
    )
