"""What serving adds to the engine: round trips and preprocessing, beside those of others."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvla_export.pipeline.progress import OnProgress, bar, ignore
from qvla_export.shared.tables.text_table import TextTable

if TYPE_CHECKING:
    from jetson.clients.bench_preprocessing import PreprocessingTimes
    from jetson.clients.bench_server import ServerBenchmark

_WARMUP = 50
_PREPROCESSING = ("ours_p50_ms", "naive_p50_ms", "ratio")


@dataclass(frozen=True)
class ServingBench:
    """Round trips of every server, and the time of a frame's preprocessing by its size."""

    servers: "ServerBenchmark"
    preprocessing: "Mapping[str, PreprocessingTimes]"

    def to_json(self) -> dict[str, Any]:
        """Return figures, samples and versions as JSON values."""
        preprocessing = {name: times.to_json() for name, times in self.preprocessing.items()}
        return {**self.servers.to_json(), "preprocessing": preprocessing}

    def texts(self, path: Path) -> Iterator[TextTable | str]:
        """Yield the servers' round trips and the frames' preprocessing, for a terminal."""
        servers = self.servers
        title = f"round trip, two images of {servers.side} x {servers.side}, loopback, ms"
        yield TextTable(("server", "p50", "p90", "p99", "max"), title=title).with_rows(
            (name, *(f"{servers.percentile(name, percent):.3f}" for percent in (50, 90, 99, 100)))
            for name in servers.round_trips_ms
        )
        title = "preprocessing a frame for two vision towers, p50, ms"
        yield TextTable(("frame", "ours", "naive PIL", "ratio"), title=title).with_rows(
            (name, *(f"{times.to_json()[key]:.3f}" for key in _PREPROCESSING))
            for name, times in self.preprocessing.items()
        )
        counts = {len(samples) for samples in servers.round_trips_ms.values()}
        yield f"bench server: {max(counts)} requests to each server -> {path}"


def bench_server(
    count: int, side: int = 224, frames: int = 200, on_progress: OnProgress = ignore
) -> ServingBench:
    """Time round trips with an engine that does nothing, all servers in turn.

    Args:
        count: requests to each server.
        side: pixels of a side of both images.
        frames: frames preprocessed of each size.
        on_progress: hears of every round.

    Raises:
        RemoteError: a server did not start.
    """
    from jetson.clients.bench_preprocessing import measure_preprocessing
    from jetson.clients.bench_server import measure_servers

    servers = measure_servers(count, side, _WARMUP, bar(on_progress, "rounds"))
    return ServingBench(servers, measure_preprocessing(frames))
