"""What tracing a policy into graphs takes, found by tracing two of its smallest parts."""

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

# Of the part that shows what a layer takes: few enough to be quick, enough to show.
_FEWEST_LAYERS = 4


@dataclass(frozen=True)
class TraceRates:
    """CPU seconds of tracing: of the first graph of a process, of any graph, of a layer in it."""

    once_s: float
    graph_s: float
    layer_s: float

    def cpu_s(self, graphs: int, layers: int, first: bool) -> float:
        """Return the CPU seconds of so many graphs with so many layers in all."""
        return self.once_s * first + self.graph_s * graphs + self.layer_s * layers


def measure_tracing(policy: "Policy", costs: PolicyCosts, target: Target) -> TraceRates | None:
    """Trace a part with the fewest layers twice and one with some: seconds, of Python's work.

    Args:
        policy: its weights are not read.
        costs: of the policy.
        target: for its operator set.

    Returns:
        None where no two parts differ enough.
    """
    parts, layers = policy.parts(1), policy.layers()
    counts = [len(part.layers) for part in costs.parts]
    least = min(counts, default=0)
    more = [count for count in counts if count >= least + _FEWEST_LAYERS]
    if len(parts) != len(counts) or not more:
        return None
    few, some = parts[counts.index(least)], parts[counts.index(min(more))]

    def traced_s(part: "PolicyPart") -> float:
        from qvla_export.graph.float_graph import export_part

        began = time.process_time()
        export_part(policy, part, layers, target)
        return time.process_time() - began

    with _quiet_tracing():
        first_s, few_s, some_s = map(traced_s, (few, few, some))
    layer_s = max((some_s - few_s) / (min(more) - least), 0.0)
    graph_s = max(few_s - least * layer_s, 0.0)
    return TraceRates(max(first_s - few_s, 0.0), graph_s, layer_s)


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
