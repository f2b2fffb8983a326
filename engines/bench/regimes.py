"""The two regimes that are measured, and their results as JSON and as rows of a table."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.bench.contender import Contender
from engines.bench.contenders import BASELINE, DYNAMIC, prepare
from engines.bench.decoder import DecoderGeometry, DecoderStack
from engines.bench.modelopt import ModeloptEnvironment
from engines.bench.pairs import compare_pairs
from engines.bench.peaks import MachinePeaks
from engines.rounds import Clock, speedup, time_in_turn


@dataclass(frozen=True)
class Timing:
    """How contenders are timed."""

    # Threads of one operator, and samples of each contender.
    threads: int
    rounds: int
    clock: Clock = "wall"


@dataclass(frozen=True)
class Regime:
    """A geometry, and how many tokens pass at once."""

    name: str
    geometry: DecoderGeometry

    def with_layers(self, layers: int | None) -> "Regime":
        """Return it with another number of layers; None for its own."""
        depth = self.geometry.depth if layers is None else layers
        return replace(self, geometry=replace(self.geometry, depth=depth))


# "pass": compute-bound. "decode": one row, no cache of keys and values; float32 weights are
# 1.6 GB, and a round of all contenders reads several GB between two runs of one, so that even
# 4-bit weights come from memory and not from a large shared cache.
REGIMES = (
    Regime("pass", DecoderGeometry(1024, 2816, 8, 16, tokens=300)),
    Regime("decode", DecoderGeometry(2048, 5632, 8, 32, tokens=1)),
)
QUICK_REGIMES = (
    Regime("pass", DecoderGeometry(128, 352, 2, 4, tokens=16)),
    Regime("decode", DecoderGeometry(128, 352, 2, 4, tokens=1)),
)


def run_regime(
    regime: Regime,
    folder: Path,
    timing: Timing,
    peaks: MachinePeaks,
    modelopt: ModeloptEnvironment | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure one regime.

    Args:
        regime: which.
        folder: empty; gets the graphs.
        timing: threads, samples, clock.
        peaks: of this machine.
        modelopt: its environment; None leaves its contenders out.
        on_progress: called with (rounds done, rounds in all).
    """
    stack = DecoderStack(regime.geometry)
    contenders = prepare(stack, folder, timing.threads, modelopt)
    x = stack.example(regime.geometry.tokens, seed=2)
    outputs = {c.name: c.run(x) for c in contenders}
    calls = {c.name: (lambda c=c: c.run(x)) for c in contenders}
    samples = time_in_turn(calls, timing.rounds, on_progress, timing.clock)
    weights = sum(channels * inputs for channels, inputs in stack.shapes.values())
    rows = []
    for contender in contenders:
        row = _row(contender, samples, regime.geometry.tokens, 2 * weights, peaks)
        rows.append({**row, "cosine_to_float": _cosine(outputs, contender.name)})
    pairs = compare_pairs(samples, regime.geometry.tokens)
    return {
        "regime": regime.name,
        **asdict(regime.geometry),
        "weights": weights,
        "engines": rows,
        "pairs": [{**asdict(pair), "text": str(pair)} for pair in pairs],
    }


def _row(
    contender: Contender,
    samples: dict[str, NDArray[np.float64]],
    tokens: int,
    float16_bytes: int,
    peaks: MachinePeaks,
) -> dict[str, Any]:
    own = samples[contender.name]
    seconds = float(np.median(own)) / 1e3
    low, high = np.percentile(own, (10, 90))
    operations = 2 * tokens * contender.multiplications / 1e9
    reached = contender.read_bytes / seconds / 1e9
    return {
        "name": contender.name,
        "median_ms": seconds * 1e3,
        "p10_ms": float(low),
        "p90_ms": float(high),
        "speedup": asdict(speedup(own, samples[BASELINE])),
        "speedup_over_dynamic_int8": asdict(speedup(own, samples[DYNAMIC])),
        "stored_bytes": contender.stored_bytes,
        "share_of_float16": contender.stored_bytes / float16_bytes,
        "multiplications_per_token": contender.multiplications,
        "arithmetic": contender.arithmetic,
        "gemm_peak_share": operations / seconds / peaks.of(contender.arithmetic),
        "bandwidth_gb_s": reached,
        "bandwidth_share": reached / peaks.bandwidth_gb_s,
        "samples_ms": own.tolist(),
    }


def _cosine(outputs: dict[str, NDArray[np.float32]], name: str) -> float:
    mine, reference = outputs[name].ravel(), outputs[BASELINE].ravel()
    return float(mine @ reference / np.linalg.norm(mine) / np.linalg.norm(reference))
