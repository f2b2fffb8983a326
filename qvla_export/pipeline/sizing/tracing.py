"""What tracing a policy into graphs takes, found by tracing one of its parts of each kind."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qvla_export.pipeline.sizing.policy_costs import PolicyCosts
from qvla_export.shared.target import Target

if TYPE_CHECKING:
    from qvla_export.policies.base import Policy, PolicyPart


@dataclass(frozen=True)
class TraceRates:
    """CPU seconds of tracing: of a process's first graph, of any graph, of all parts within."""

    once_s: float
    graph_s: float
    inside_s: float

    def cpu_s(self, graphs: int, first: bool) -> float:
        """Return the CPU seconds of a policy that is cut into so many graphs."""
        return self.once_s * first + self.graph_s * graphs + self.inside_s


def measure_tracing(policy: "Policy", costs: PolicyCosts, target: Target) -> TraceRates | None:
    """Trace a part with the fewest layers twice, and one of each other number of layers.

    Parts with as many layers are taken for alike: towers, blocks of a decoder. Of the latter the
    second is traced, since the first also puts the prompt together.

    Args:
        policy: its weights are not read.
        costs: of the policy.
        target: for its operator set.

    Returns:
        None where there are not several parts.
    """
    parts, layers = policy.parts(1), policy.layers()
    counts = [len(part.layers) for part in costs.parts]
    if len(parts) != len(counts) or len(parts) < 2:
        return None

    def traced_s(part: "PolicyPart") -> float:
        from qvla_export.graph.float_graph import export_part

        began = time.process_time()
        export_part(policy, part, layers, target)
        return time.process_time() - began

    least, inside_s = min(counts), 0.0
    few = parts[counts.index(least)]
    with _quiet_tracing():
        first_s, graph_s = traced_s(few), traced_s(few)
        for count in sorted({*counts} - {least}):
            alike = [part for part, own in zip(parts, counts, strict=True) if own == count]
            one_s = traced_s(alike[min(1, len(alike) - 1)])
            inside_s += len(alike) * max(one_s - graph_s, 0.0)
    return TraceRates(max(first_s - graph_s, 0.0), graph_s, inside_s)


@contextmanager
def _quiet_tracing() -> Iterator[None]:
    """Keep quiet about graphs that nobody gets."""
    log = logging.getLogger("qvla_export.graph.float_graph")
    before = log.level
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        log.setLevel(before)
