"""What serving adds to the engine: round trips and preprocessing, beside those of others."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qvla_export.pipeline.progress import OnProgress, bar, ignore

if TYPE_CHECKING:
    from jetson.clients.bench_preprocessing import PreprocessingTimes
    from jetson.clients.bench_server import ServerBenchmark

_WARMUP = 50


@dataclass(frozen=True)
class ServingBench:
    """Round trips of every server, and the time of a frame's preprocessing by its size."""

    servers: "ServerBenchmark"
    preprocessing: "Mapping[str, PreprocessingTimes]"

    def to_json(self) -> dict[str, Any]:
        """Return figures, samples and versions as JSON values."""
        preprocessing = {name: times.to_json() for name, times in self.preprocessing.items()}
        return {**self.servers.to_json(), "preprocessing": preprocessing}


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
