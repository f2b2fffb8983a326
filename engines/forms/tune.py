"""Find the form in which a bundle runs fastest on this machine, within a bound of memory.

Layers are timed by ONNX Runtime's profiler in both of their forms: as stored (packed codes; int8
where inputs are rounded) and as float32. Those that gain most for a byte become float until the
bound is reached. Then whole actions decide between runtimes and forms, all in turn; what acts
otherwise than it must is not taken.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.base import Engine, EngineError, Feeds
from engines.forms.candidates import (
    Candidate,
    LayerForms,
    Trial,
    choose_layers,
    fastest,
    runtimes_here,
)
from engines.forms.float_layers import FloatLayers, all_layers
from engines.forms.folded import ResidentBytes, resident_bytes
from engines.forms.tuning import TimedForm, Tuning, runtime_versions, tuning_key
from engines.layer_times import LayerTimes
from engines.ort import OrtEngine
from engines.rounds import Clock, time_in_turn
from engines.targets import find_target
from engines.verify import judge
from qvla_export.shared.bundle import Bundle

_AS_STORED, _IN_FLOAT, _MIXED = "as stored", "in float", "mixed"


@dataclass(frozen=True)
class TuningSettings:
    """How forms are timed and bounded."""

    # CPU threads of one operator; None for one a physical core.
    threads: int | None = None
    # Actions of each candidate, and passes in which layers are timed.
    rounds: int = 30
    layer_passes: int = 10
    # Bytes of constants in memory, as a share of the float policy's.
    byte_share: float = 0.6
    # Of whole actions. "cpu": this process's time, comparable on a busy machine; for one thread.
    # Single layers are timed by the runtime's profiler, whose clock is the wall's: it only says
    # which layers a candidate has in float, and whole actions decide.
    clock: Clock = "wall"

    def __post_init__(self) -> None:
        if self.rounds < 2 or self.layer_passes < 1 or not self.byte_share > 0:
            raise EngineError(
                "tuning needs at least 2 rounds, 1 pass and a share of bytes above 0, got "
                f"{self.rounds}, {self.layer_passes} and {self.byte_share}"
            )
        if self.clock == "cpu" and self.threads != 1:
            raise EngineError(
                f"--clock cpu adds up what all threads take; give --threads 1, got {self.threads}"
            )


@dataclass(frozen=True)
class TuningReport:
    """All that was tried of a bundle, and what was chosen."""

    trials: tuple[Trial, ...]
    # Bytes of the float policy's constants in memory.
    float_bytes: int
    # None where nothing may be taken.
    tuning: Tuning | None

    def to_json(self) -> dict[str, Any]:
        """Return everything but the names of layers."""
        chosen = None if self.tuning is None else self.tuning.form
        trials = [trial.to_json() for trial in self.trials]
        return {"trials": trials, "float_bytes": self.float_bytes, "chosen": chosen}


def tune(
    bundle: Bundle,
    settings: TuningSettings,
    on_progress: Callable[[int, int], None] | None = None,
) -> TuningReport:
    """Time every form of a bundle and choose; nothing is written.

    Args:
        bundle: for target `cpu`.
        settings: how.
        on_progress: called with (rounds done, rounds in all) while whole actions are timed.

    Raises:
        EngineError: the bundle is for another target, or runs in no form.
    """
    target = find_target(bundle.target)
    if target.runtime != "ort":
        raise EngineError(
            f"{bundle.path} is for target {target.name!r}, whose builder picks its own kernels; "
            "qvla tune is for bundles of target cpu"
        )
    stored, float_bytes = _stored_bytes(bundle)
    candidates, bytes_of = _candidates(bundle, settings, stored, float_bytes)
    with ExitStack() as stack:
        engines: dict[str, Engine] = {}
        refusals: dict[str, str] = {}
        for candidate in candidates:
            try:
                engine = stack.enter_context(candidate.open(bundle, settings.threads))
                breaches = judge(bundle, engine).breaches
            except EngineError as error:  # it does not open, or puts out NaN
                refusals[candidate.name] = str(error)
                continue
            engines[candidate.name] = engine
            refusals[candidate.name] = "; ".join(breaches)
        feeds = bundle.golden().feeds[0]
        calls = {name: _call(engine, feeds) for name, engine in engines.items()}
        samples = time_in_turn(calls, settings.rounds, on_progress, settings.clock)
    # A float bundle is what others are measured against.
    bound = settings.byte_share * float_bytes if bundle.plan is not None else float("inf")
    trials = tuple(
        Trial(c, _timed(c.name, samples.get(c.name), bytes_of[c.form], refusals[c.name], bound))
        for c in candidates
    )
    return TuningReport(trials, float_bytes, _tuning(bundle, settings, trials, float_bytes))


def _tuning(
    bundle: Bundle, settings: TuningSettings, trials: Sequence[Trial], float_bytes: int
) -> Tuning | None:
    """Return the fastest trial as what is kept; None where none may be taken."""
    best = fastest(trials)
    if best is None or best.timed.median_ms is None or best.timed.resident_bytes is None:
        return None
    runtime = best.candidate.runtime
    return Tuning(
        tuning_key(bundle, settings.threads),
        runtime,
        runtime_versions(runtime),
        best.candidate.float_layers,
        best.timed.median_ms,
        best.timed.resident_bytes,
        float_bytes,
        tuple(trial.timed for trial in trials),
    )


def _stored_bytes(bundle: Bundle) -> tuple[ResidentBytes, int]:
    """Return what a bundle holds in memory as stored, and what the float policy holds."""
    stored = resident_bytes(bundle, {})
    if bundle.plan is None:
        return stored, stored.total
    # The plan knows its layers in float16; what is no layer is the same in both.
    every = all_layers(bundle)
    layers = [n for (part, name), n in stored.layers.items() if name in every.get(part, ())]
    return stored, stored.total - sum(layers) + 2 * int(bundle.plan["float16_bytes"])


def _candidates(
    bundle: Bundle, settings: TuningSettings, stored: ResidentBytes, float_bytes: int
) -> tuple[list[Candidate], dict[str, int]]:
    """Return what is tried, and the bytes that each form holds in memory."""
    every = all_layers(bundle)
    forms: dict[str, FloatLayers] = {_AS_STORED: {}}
    nbytes = {_AS_STORED: stored.total}
    if every:
        whole = resident_bytes(bundle, every)
        room = int(settings.byte_share * float_bytes) - stored.total
        layers = _layer_forms(bundle, settings, every, (stored, whole))
        mixed = choose_layers(layers, room)
        if mixed and mixed != every:
            forms[_MIXED] = mixed
            nbytes[_MIXED] = resident_bytes(bundle, mixed).total
        forms[_IN_FLOAT] = every
        nbytes[_IN_FLOAT] = whole.total
    runtimes = runtimes_here()
    return [Candidate(r, form, forms[form]) for r in runtimes for form in forms], nbytes


def _layer_forms(
    bundle: Bundle,
    settings: TuningSettings,
    every: FloatLayers,
    nbytes: tuple[ResidentBytes, ResidentBytes],
) -> list[LayerForms]:
    """Time each layer as stored and in float."""
    feeds, passes = bundle.golden().feeds[0], settings.layer_passes
    times = []
    for float_layers in ({}, every):
        with OrtEngine(
            bundle, settings.threads, keep_loaded=False, float_layers=float_layers
        ) as engine:
            times.append(_by_part_and_layer(engine.layer_times(feeds, passes)))
    stored, whole = nbytes
    return [
        LayerForms(
            part,
            layer,
            times[0].get((part, layer), 0.0),
            times[1].get((part, layer), 0.0),
            stored.layers.get((part, layer), 0),
            whole.layers.get((part, layer), 0),
        )
        for part, layers in every.items()
        for layer in layers
    ]


def _by_part_and_layer(times: LayerTimes) -> dict[tuple[str, str], float]:
    found: dict[tuple[str, str], float] = {}
    for row in times.rows:
        if row.layer:
            key = row.part, row.layer
            found[key] = found.get(key, 0.0) + row.median_ms
    return found


def _call(engine: Engine, feeds: Feeds) -> Callable[[], object]:
    return lambda: engine.infer(feeds)


def _timed(
    name: str, samples: NDArray[np.float64] | None, nbytes: int, refusal: str, bound: float
) -> TimedForm:
    """Return a form's figures; what takes more memory than the bound is refused."""
    if samples is None:
        return TimedForm(name, None, None, None, None, refusal)
    low, median, high = map(float, np.percentile(samples, (10, 50, 90)))
    if not refusal and nbytes > bound:
        refusal = f"at most {bound / 1e6:.2f} MB are allowed"
    return TimedForm(name, median, low, high, nbytes, refusal)
