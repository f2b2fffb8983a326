"""QVLA: quantize a robot policy by what each weight channel does to the action, and run it.

    import qvla_export as qvla

    policy = qvla.load_policy("my/checkpoint", preset="libero")
    observations = qvla.CalibrationSet.from_dataset("my/lerobot", cameras={...}, count=64)
    result = qvla.quantize(policy, observations, bits=4, target="cpu", run="runs/mine")
    with qvla.open_bundle(result.bundle) as robot:
        chunk = robot.infer(observations.held_out[0])

What is listed in `__all__` is the public surface; everything else may change. A name is imported
when it is first used, so that a robot that only opens bundles needs neither torch nor onnx.
"""

import functools
import importlib
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calibration.calibration_set import CalibrationSet as CalibrationSet
    from engines.targets import find_target as find_target
    from jetson.clients.http_client import RemotePolicy as RemotePolicy
    from jetson.policy import EnginePolicy as EnginePolicy
    from jetson.policy import open_bundle as open_bundle
    from jetson.server import open_server as open_server
    from jetson.server import serve as serve
    from jetson.server_settings import ServerSettings as ServerSettings
    from qvla_export.allocation.setting import Setting as Setting
    from qvla_export.allocation.setting import parse_setting as parse_setting
    from qvla_export.pipeline.action_error import HeldOutError as HeldOutError
    from qvla_export.pipeline.deploy import Deployment as Deployment
    from qvla_export.pipeline.deploy import DeploymentResult as DeploymentResult
    from qvla_export.pipeline.deploy import deploy as deploy
    from qvla_export.pipeline.progress import Progress as Progress
    from qvla_export.pipeline.quantize import QuantizationResult as QuantizationResult
    from qvla_export.pipeline.quantize import quantize as quantize
    from qvla_export.pipeline.run_folder import RunFolder as RunFolder
    from qvla_export.policies.base import Policy as Policy
    from qvla_export.policies.families import load_policy as load_policy
    from qvla_export.quantizer.plan import BitPlan as BitPlan
    from qvla_export.report.page import write_report as write_report
    from qvla_export.sensitivity.sensitivities import Sensitivities as Sensitivities
    from qvla_export.shared.action import ActionChunk as ActionChunk
    from qvla_export.shared.bundle import Bundle as Bundle
    from qvla_export.shared.errors import ArtifactError as ArtifactError
    from qvla_export.shared.errors import ArtifactMismatch as ArtifactMismatch
    from qvla_export.shared.errors import CheckpointError as CheckpointError
    from qvla_export.shared.errors import InvalidObservation as InvalidObservation
    from qvla_export.shared.errors import QvlaError as QvlaError
    from qvla_export.shared.observation import Observation as Observation
    from qvla_export.shared.target import Target as Target

__version__ = "0.1.0"

# Module -> the public names it defines.
_HOMES = {
    "calibration.calibration_set": ("CalibrationSet",),
    "engines.targets": ("find_target",),
    "jetson.clients.http_client": ("RemotePolicy",),
    "jetson.policy": ("EnginePolicy", "open_bundle"),
    "jetson.server": ("open_server", "serve"),
    "jetson.server_settings": ("ServerSettings",),
    "qvla_export.allocation.setting": ("Setting", "parse_setting"),
    "qvla_export.pipeline.action_error": ("HeldOutError",),
    "qvla_export.pipeline.deploy": ("Deployment", "DeploymentResult", "deploy"),
    "qvla_export.pipeline.progress": ("Progress",),
    "qvla_export.pipeline.quantize": ("QuantizationResult", "quantize"),
    "qvla_export.pipeline.run_folder": ("RunFolder",),
    "qvla_export.policies.base": ("Policy",),
    "qvla_export.policies.families": ("load_policy",),
    "qvla_export.quantizer.plan": ("BitPlan",),
    "qvla_export.report.page": ("write_report",),
    "qvla_export.sensitivity.sensitivities": ("Sensitivities",),
    "qvla_export.shared.action": ("ActionChunk",),
    "qvla_export.shared.bundle": ("Bundle",),
    "qvla_export.shared.errors": (
        "ArtifactError",
        "ArtifactMismatch",
        "CheckpointError",
        "InvalidObservation",
        "QvlaError",
    ),
    "qvla_export.shared.observation": ("Observation",),
    "qvla_export.shared.target": ("Target",),
}

__all__ = [  # defined by __getattr__
    "ActionChunk",
    "ArtifactError",
    "ArtifactMismatch",
    "BitPlan",
    "Bundle",
    "CalibrationSet",
    "CheckpointError",
    "Deployment",
    "DeploymentResult",
    "EnginePolicy",
    "HeldOutError",
    "InvalidObservation",
    "Observation",
    "Policy",
    "Progress",
    "QuantizationResult",
    "QvlaError",
    "RemotePolicy",
    "RunFolder",
    "Sensitivities",
    "ServerSettings",
    "Setting",
    "Target",
    "deploy",
    "find_target",
    "load_policy",
    "open_bundle",
    "open_server",
    "parse_setting",
    "quantize",
    "serve",
    "write_report",
]


def __getattr__(name: str) -> Any:
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = _with_extras_named(lambda: getattr(importlib.import_module(home), name))
    if isinstance(value, types.FunctionType):
        function = value

        @functools.wraps(function)
        def value(*args: Any, **kwargs: Any) -> Any:
            return _with_extras_named(lambda: function(*args, **kwargs))

    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _with_extras_named(call: Callable[[], Any]) -> Any:
    """Call; a library that is not installed becomes an error that names its extra."""
    from qvla_export.shared.errors import missing_extra

    try:
        return call()
    except ModuleNotFoundError as error:
        if (missing := missing_extra(error)) is None:
            raise
        raise missing from error
