"""Float graphs, traced once for all tests of a process: a tiny policy takes five seconds."""

import onnx_ir as ir

from qvla_export.graph.float_graph import export_float
from qvla_export.policies.base import Policy
from qvla_export.shared.target import Target

_GRAPHS: dict[tuple[str, str], dict[str, ir.Model]] = {}


def traced(policy: Policy, target: Target) -> dict[str, ir.Model]:
    """Return a policy's float graphs for a target, as `export_float` does; leave them as they are.

    For policies whose weights are those of their digest.
    """
    key = (policy.digest, target.name)
    if key not in _GRAPHS:
        _GRAPHS[key] = export_float(policy, target)
    return _GRAPHS[key]
