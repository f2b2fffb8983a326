"""What ONNX Runtime's own profiler says of every node. Standard library and numpy only."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.base import EngineError
from engines.layer_times import LayerTime

_KERNEL = "_kernel_time"


def read_profile(
    path: Path, part: str, runs: int, dropped: int, calls: int = 1
) -> tuple[LayerTime, ...]:
    """Read a profile that ONNX Runtime wrote of one session.

    Its clock counts whole microseconds: small nodes are 0, 1 or 2 of them.

    Args:
        path: JSON, a list of trace events.
        part: whose session it was.
        runs: how many actions it ran for.
        dropped: first of them to leave out.
        calls: how often it ran for one action; their times are added up.

    Raises:
        EngineError: it is no such profile, or holds a node more or less often than it ran.
    """
    try:
        events = json.loads(path.read_text())
        nodes = [event for event in events if event.get("cat") == "Node"]
        taken: dict[tuple[int, str], list[float]] = {}
        kinds: dict[tuple[int, str], str] = {}
        for event in nodes:
            name = str(event["name"])
            if not name.endswith(_KERNEL):
                continue
            key = int(event["args"]["node_index"]), name.removesuffix(_KERNEL)
            kinds[key] = str(event["args"]["op_name"])
            taken.setdefault(key, []).append(float(event["dur"]) / 1e3)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise EngineError(
            f"ONNX Runtime's profile of part {part!r} cannot be read "
            f"({type(error).__name__}: {error}); is it another version's?"
        ) from error
    odd = {name: len(times) for (_, name), times in taken.items() if len(times) != runs * calls}
    if odd or not taken:
        raise EngineError(
            f"ONNX Runtime's profile of part {part!r} holds {len(taken)} nodes, of which "
            f"{len(odd)} ran not {runs * calls} times: {dict(list(odd.items())[:3])}; it keeps a "
            "million events, so ask for fewer passes"
        )
    return tuple(
        LayerTime.of_node(part, name, kinds[index, name], _by_action(times, calls)[dropped:])
        for (index, name), times in taken.items()
    )


def _by_action(times_ms: list[float], calls: int) -> NDArray[np.float64]:
    """Add up a node's calls of one action.  float64 [actions]"""
    total: NDArray[np.float64] = np.array(times_ms).reshape(-1, calls).sum(axis=1)
    return total


def profiling_options(options: Any, folder: Path, part: str) -> Any:
    """Turn a session's profiler on, which writes into a folder."""
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / part)
    return options
