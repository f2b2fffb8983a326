"""The `Engine` protocol and the checks every engine makes of its inputs."""

import abc
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from engines.layer_times import LayerTimes
from qvla_export.shared.artifacts import read_json, require_fields
from qvla_export.shared.bundle import PLAN, Bundle
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.part import TensorSpec

_Self = TypeVar("_Self")  # typing.Self needs Python 3.11
Feeds = Mapping[str, NDArray[Any]]


class EngineError(QvlaError):
    """An engine cannot be made or run."""


class InvalidFeeds(EngineError):
    """Named inputs do not fit the engine."""


class Engine(Protocol):
    """Runs one graph; a context manager that frees the runtime's memory."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Names, dtypes and shapes that `infer` takes."""
        ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Names, dtypes and shapes that `infer` returns."""
        ...

    @property
    def runtime(self) -> str:
        """What runs the graph, with its version: "onnxruntime 1.32.0 CPUExecutionProvider"."""
        ...

    def infer(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """Return the named outputs.

        Raises:
            InvalidFeeds: an input is missing, unknown, or of another dtype or shape.
        """
        ...

    @property
    def weight_form(self) -> str:
        """How weights are held, in words: "packed", "12 layers in float"."""
        ...

    def layer_times(self, feeds: Feeds, passes: int = 50) -> LayerTimes:
        """Run the whole graph some times under the runtime's own profiler.

        Raises:
            InvalidFeeds: as of `infer`.
            EngineError: the runtime has none that tells layers apart.
        """
        ...

    @property
    def part_ms(self) -> Mapping[str, float]:
        """Milliseconds of the last `infer` by run of the program; empty before the first.

        A graph that runs once by itself goes by its name, parts that repeat by their run's
        ("decode"), all repetitions together. Where the runtime lets copies be told apart
        (TensorRT, by events in the GPU's stream) also "host_to_device" and "device_to_host";
        where there are none, or they are hidden in a part (ONNX Runtime), neither.
        """
        ...

    @property
    def part_calls(self) -> Mapping[str, int]:
        """How many graphs the last `infer` ran, by run of the program; empty before the first."""
        ...

    def close(self) -> None:
        """Free the runtime's memory; `infer` fails afterwards."""
        ...

    def __enter__(self: _Self) -> _Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


class BundleEngine(abc.ABC):
    """What every engine of a bundle has in common; see `Engine`."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._is_open = True
        self._part_ms: Mapping[str, float] = {}
        self._part_calls: Mapping[str, int] = {}

    @property
    def part_ms(self) -> Mapping[str, float]:
        """Milliseconds of the last `infer` by run, in order; see `Engine`."""
        return self._part_ms

    @property
    def part_calls(self) -> Mapping[str, int]:
        """How many graphs the last `infer` ran, by run; see `Engine`."""
        return self._part_calls

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Names, dtypes and shapes that `infer` takes."""
        return self._bundle.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """Names, dtypes and shapes that `infer` returns."""
        return self._bundle.outputs

    @property
    def weight_form(self) -> str:
        """How weights are held, in words; see `Engine`."""
        return "packed"

    @abc.abstractmethod
    def layer_times(self, feeds: Feeds, passes: int = 50) -> LayerTimes:
        """Run the whole bundle some times under the runtime's own profiler; see `Engine`."""

    @abc.abstractmethod
    def close(self) -> None:
        """Free the runtime's memory; `infer` fails afterwards."""

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _admit(self, feeds: Feeds) -> None:
        """Refuse what cannot be run: a closed engine, inputs that do not fit.

        Raises:
            InvalidFeeds: see `check_feeds`.
            EngineError: the engine is closed.
        """
        if not self._is_open:
            raise EngineError("the engine is closed; load it again")
        check_feeds(self.inputs, feeds)


def rounds_activations(bundle: Bundle) -> bool:
    """Say whether a bundle's plan rounds activations to integers.

    Raises:
        ArtifactError: the bundle's plan is damaged.
    """
    if bundle.plan is None:
        return False
    # One field of it; the robot has no use for the whole plan.
    plan = read_json(bundle.path / PLAN, "bit plan")
    require_fields(plan, ("activations",), f"bit plan of {bundle.path}")
    return plan["activations"] is not None


def rounds_in_kernels(bundle: Bundle) -> bool:
    """Say whether a bundle asks for kernels that round activations to 8 bits a block."""
    return bool(bundle.engine_options.get("accuracy_level", 0) == 4)


def require_threads(threads: int | None) -> None:
    """Refuse a number of CPU threads that is none.

    Raises:
        EngineError: it is below 1.
    """
    if threads is not None and threads < 1:
        raise EngineError(f"threads must be at least 1 or None, got {threads}")


def check_feeds(inputs: Sequence[TensorSpec], feeds: Feeds) -> None:
    """Refuse inputs that do not fit, before the runtime does so less clearly.

    Raises:
        InvalidFeeds: naming the input, what it must be and what it is.
    """
    wanted = {spec.name for spec in inputs}
    if wanted != set(feeds):
        raise InvalidFeeds(
            f"the engine takes inputs {sorted(wanted)}, got {sorted(feeds)}: "
            f"missing {sorted(wanted - set(feeds))}, unknown {sorted(set(feeds) - wanted)}"
        )
    sizes: dict[str, int] = {}
    for spec in inputs:
        value = feeds[spec.name]
        if not isinstance(value, np.ndarray) or value.dtype.name != spec.dtype:
            found = value.dtype.name if isinstance(value, np.ndarray) else type(value).__name__
            raise InvalidFeeds(
                f"input {spec.name!r} must be a {spec.dtype} array, got {found}; convert it"
            )
        if not _fits(value.shape, spec.shape, sizes):
            raise InvalidFeeds(
                f"input {spec.name!r} must have shape {list(spec.shape)}, got {list(value.shape)}"
            )


def _fits(shape: tuple[int, ...], wanted: tuple[int | str, ...], sizes: dict[str, int]) -> bool:
    """Equal sizes; a name takes any positive size, the same wherever it occurs."""
    return len(shape) == len(wanted) and all(
        size == (sizes.setdefault(name, size) if isinstance(name, str) else name) and size > 0
        for size, name in zip(shape, wanted, strict=True)
    )
