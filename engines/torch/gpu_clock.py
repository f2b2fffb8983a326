"""What work takes on a GPU, by the events in its stream."""

from collections.abc import Callable

import torch


def gpu_ms(work: Callable[[], object]) -> float:
    """Run work on the current GPU's stream, wait for its end and return its milliseconds."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch has no types there
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
