"""`require_clean`: what every exported bundle must pass, called where tests export one."""

from engines.check.bundle import check_bundle, check_model
from engines.check.finding import GraphFinding, require_no_errors
from engines.targets import find_target
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.target import Target


def require_clean(bundle: Bundle, target: Target | None = None) -> tuple[GraphFinding, ...]:
    """Check a bundle for its own target, or its graphs for another; return the warnings.

    Raises:
        CheckFailed: a graph breaks a rule.
    """
    if target is None or target.name == bundle.target:
        found = check_bundle(bundle, find_target(bundle.target))
    else:
        graphs = [bundle.model_path(stage) for stage in bundle.parts]
        found = tuple(f for graph in graphs for f in check_model(graph, target))
    require_no_errors(found)
    return found
