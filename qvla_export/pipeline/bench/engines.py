"""Latency of every engine on this machine's CPU, on a random decoder, in one run."""

import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvla_export.pipeline.progress import OnProgress, bar, ignore
from qvla_export.shared.artifacts import versions, write_json
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.tables.text_table import TextTable

if TYPE_CHECKING:
    from engines.bench.peaks import MachinePeaks
    from engines.rounds import Clock

# Libraries beside ours that run or make contenders.
_OTHERS = ("openvino", "nncf", "torchao")


@dataclass(frozen=True)
class EngineBenchRequest:
    """How engines are timed."""

    # Threads of one operator, and samples of each engine.
    threads: int = 1
    rounds: int = 30
    # Environment with modelopt, made with pip if missing; None leaves its engines out.
    modelopt: Path | None = None
    # Tiny sizes: shows that it works.
    quick: bool = False
    # What is read before and after each call: "wall", or on a busy machine "cpu".
    clock: "Clock" = "wall"
    # "pass" or "decode"; None for both.
    regime: str | None = None
    # Of the decoder; None for each regime's own.
    layers: int | None = None


@dataclass(frozen=True)
class EngineBench:
    """What was measured, on which machine."""

    # CPU, threads, versions, the command.
    machine: Mapping[str, Any]
    rounds: int
    clock: "Clock"
    peaks: "MachinePeaks"
    # Of each regime: its sizes, and of every engine milliseconds and shares of the peaks.
    regimes: Sequence[Mapping[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            **self.machine,
            "rounds": self.rounds,
            "clock": self.clock,
            "peaks": asdict(self.peaks),
            "regimes": list(self.regimes),
        }

    def texts(self, path: Path) -> Iterator[str | TextTable]:
        """Yield a table of each regime, and what the machine could do, for a terminal."""
        for regime in self.regimes:
            yield _table(regime)
            yield from (pair["text"] for pair in regime["pairs"])
        peaks = self.peaks
        yield (
            f"peaks, {self.machine['threads']} thread(s): float32 {peaks.float32_gflops:.0f} "
            f"GFLOP/s, int8 {peaks.int8_gops:.0f} GOP/s, {peaks.bandwidth_gb_s:.1f} GB/s -> {path}"
        )


def _table(regime: Mapping[str, Any]) -> TextTable:
    title = "{regime}: width {width}, MLP {mlp}, {depth} layers, {tokens} token(s)"
    heads = ("engine", "ms [p10, p90]", "x FP32 [95 %]", "of FP16 bytes", "peak", "bandwidth")
    return TextTable(heads, title=title.format(**regime)).with_rows(
        (
            row["name"],
            f"{row['median_ms']:.2f} [{row['p10_ms']:.2f}, {row['p90_ms']:.2f}]",
            "{median:.2f} [{low:.2f}, {high:.2f}]".format(**row["speedup"]),
            f"{row['share_of_float16']:.3f}",
            f"{row['gemm_peak_share']:.0%}",
            f"{row['bandwidth_share']:.0%}",
        )
        for row in regime["engines"]
    )


def bench_engines(
    request: EngineBenchRequest, output: Path, on_progress: OnProgress = ignore
) -> EngineBench:
    """Time float, other quantizers and ours: a whole pass, and decoding token by token.

    Args:
        request: how they are timed.
        output: JSON file, written after each regime: an interrupted run leaves what it has.
        on_progress: hears of every round.

    Raises:
        QvlaError: modelopt's environment cannot be made.
    """
    import torch

    from engines.bench.modelopt import REQUIREMENTS, ModeloptEnvironment
    from engines.bench.peaks import measure_peaks
    from engines.bench.regimes import QUICK_REGIMES, REGIMES, Timing, run_regime

    threads, timing = request.threads, Timing(request.threads, request.rounds, request.clock)
    if threads > 1 and request.clock == "cpu":
        raise QvlaError(
            f"--clock cpu adds up what all threads take, so it is for --threads 1, got {threads}"
        )
    torch.set_num_threads(threads)
    environment = None if request.modelopt is None else ModeloptEnvironment(request.modelopt)
    if environment is not None:
        environment.create()
    sizes = {"size": 256, "buffer_bytes": 1 << 22} if request.quick else {}
    peaks = measure_peaks(threads, clock=request.clock, **sizes)
    machine = _machine(threads, REQUIREMENTS[:1] if request.modelopt else ())
    bench = EngineBench(machine, timing.rounds, timing.clock, peaks, ())
    regimes = QUICK_REGIMES if request.quick else REGIMES
    chosen = [r for r in regimes if request.regime in (None, r.name)]
    for regime in [r.with_layers(request.layers) for r in chosen]:
        report = bar(on_progress, f"{regime.name}: rounds")
        with tempfile.TemporaryDirectory() as folder:
            row = run_regime(regime, Path(folder), timing, peaks, environment, report)
        bench = replace(bench, regimes=(*bench.regimes, row))
        write_json(output, bench.to_json())
    return bench


def _machine(threads: int, others: tuple[str, ...]) -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "command": " ".join(["qvla", *sys.argv[1:]]),
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load_average": list(os.getloadavg()),
        "threads": threads,
        "versions": {**versions(*_OTHERS), **dict(name.split("==") for name in others)},
        "note": "random weights, widths drawn at random: outputs mean nothing, times do. "
        "accuracy level 4 of 'ours w4', 'ours w3' and modelopt INT4 rounds activations to 8 bits",
    }
