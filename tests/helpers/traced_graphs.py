"""Float graphs, traced once for all tests of a process: a tiny policy takes five seconds."""

from typing import Any

import onnx_ir as ir

from qvla_export.pipeline import export as exporting
from qvla_export.policies.base import Policy
from qvla_export.shared.target import Target

# A run keeps one policy's. Not all: what is kept is looked through when memory is measured.
_POLICIES = 16


class KeptGraphs(dict[tuple[str, str], Any]):
    """What the pipeline keeps of a run, kept for later tests too."""

    def clear(self) -> None:
        """Make room for another policy."""
        while len(self) >= _POLICIES:
            self.pop(next(iter(self)))


def keep_graphs() -> None:
    """Let runs of one policy in this process share its graphs, as settings of a run do."""
    exporting._GRAPHS = KeptGraphs(exporting._GRAPHS)


def traced(policy: Policy, target: Target) -> dict[str, ir.Model]:
    """Return a policy's float graphs for a target, as `export_float` does; leave them as they are.

    For policies whose weights are those of their digest.
    """
    graphs: dict[str, ir.Model] = exporting._float_graphs(policy, target)
    return graphs
