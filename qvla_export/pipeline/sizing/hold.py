"""Opening the policy of a deployment as its size and this machine want it."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvla_export.pipeline.run_folder import load_if_current
from qvla_export.pipeline.sizing.holding import HoldingOptions, HoldingRequest, open_held
from qvla_export.shared.artifacts import read_json

if TYPE_CHECKING:
    from qvla_export.pipeline.deploy import Deployment
    from qvla_export.policies.base import Policy


def hold(request: "Deployment", options: HoldingOptions) -> "tuple[Deployment, Policy]":
    """Choose how a deployment's policy is held, and open it so.

    Raises:
        QvlaError: see `holding.open_held`.
    """
    held = open_held(holding_request(request, options))
    return replace(request, holding=held.holding), held.policy


def holding_request(request: "Deployment", options: HoldingOptions) -> HoldingRequest:
    """Return what is to be held for a deployment; an interrupted run goes on as it began."""
    from engines.targets import find_target

    drawn = request.calibration
    dataset = None if drawn is None else drawn.dataset
    return HoldingRequest(
        request.source,
        find_target(request.target, request.zero_points, request.scales),
        request.quantizer == "compensated",
        options,
        load_if_current(request.run.description, _description, bool),
        None if dataset is None else dataset.frame(0, 0).observation,
    )


def _description(path: Path) -> dict[str, Any]:
    value = read_json(path, "run description")
    return value if isinstance(value, dict) else {}
