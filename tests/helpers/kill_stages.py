"""Kills the stages of a run at their file operations and runs them again; prints what came of it.

    python kill_stages.py <checkpoint> <dataset> <work folder>

One process imports everything once; every attempt is a forked child, which kills itself with
SIGKILL just before its n-th fsync, rename or removal.
"""

import gc
import importlib
import json
import logging
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from calibration.benchmarks.evaluation import RolloutConfig
from calibration.sources.lerobot import LeRobotDataset
from engines.targets import CPU
from qvla_export.allocation.setting import parse_setting
from qvla_export.graph.float_graph import export_float
from qvla_export.pipeline import evaluate as judging
from qvla_export.pipeline import export as exporting
from qvla_export.pipeline.calibrate import CalibrationRequest, calibrate
from qvla_export.pipeline.plan import plan as plan_setting
from qvla_export.pipeline.policy_source import PolicySource
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.pipeline.sensitivities import SensitivityRequest, sensitivities
from qvla_export.policies.oft.policy import OftPolicy, load_oft_policy
from qvla_export.report.page import write_report
from qvla_export.shared.artifacts import sha256_file, versions, write_json

# What stages import when they run: every child would do it again.
_LAZY = (
    "calibration.benchmarks.metaworld.simulator",
    "engines.load",
    "engines.ort",
    "jetson.clients.http_client",
    "jetson.latency.measure",
    "jetson.server",
    "jinja2",
    "matplotlib.backends.backend_svg",
    "matplotlib.pyplot",
    "metaworld",
    "onnxruntime",
    "onnxscript",
    "qvla_export.pipeline.resources",
    "qvla_export.policies.families",
    "qvla_export.sensitivity.estimators.registry",
    "scipy.stats",
)
_OPERATIONS = ("fsync", "replace", "rename", "unlink", "rmdir")
W4, FLOAT = parse_setting("w4"), parse_setting("float")


@dataclass(frozen=True)
class Stage:
    name: str
    run: Callable[[RunFolder], Any]
    # Artifacts of the run folder that must come out the same, byte for byte.
    artifacts: tuple[str, ...]
    # Moments to be killed at: the last file operation and random others.
    moments: int = 4
    # Changes a run folder before the stage.
    prepare: Callable[[Path], None] = lambda run: None


def damage_bundle(run: Path) -> None:
    """Cut a bundle's end off, so that exporting has to replace it."""
    weights = run / "settings/w4/bundle/policy.onnx.data"
    weights.write_bytes(weights.read_bytes()[:-1])


def all_stages(checkpoint: Path, dataset: Path, policy: OftPolicy) -> list[Stage]:
    source = PolicySource(str(checkpoint), threads=1)
    episodes = RolloutConfig(("handle-press",), 2, execute=4)
    return [
        Stage(
            "calibrate",
            lambda r: calibrate(r, CalibrationRequest(LeRobotDataset(dataset), (), 12, 8)),
            ("calibration",),
        ),
        Stage(
            "sensitivities",
            lambda r: sensitivities(
                r, policy, CPU, SensitivityRequest(quantizer="nearest", probes=2)
            ),
            ("sensitivities.safetensors",),
        ),
        Stage(
            "plan", lambda r: plan_setting(r, W4, CPU, policy.digest), ("settings/w4/plan.json",)
        ),
        Stage(
            "export",
            lambda r: [exporting.export(r, setting, policy, CPU) for setting in (FLOAT, W4)],
            ("settings/w4/bundle", "settings/float/bundle"),
        ),
        Stage(
            "export anew",
            lambda r: exporting.export(r, W4, policy, CPU),
            ("settings/w4/bundle",),
            moments=6,
            prepare=damage_bundle,
        ),
        Stage(
            "action error",
            lambda r: judging.action_error(r, W4, policy),
            ("settings/w4/action_error.json",),
            moments=1,
        ),
        Stage(
            "evaluate",
            lambda r: judging.rollouts(r, W4, episodes, source, 1),
            ("settings/w4/evaluation.json",),
        ),
        # A measurement: it only has to be there and readable.
        Stage("latency", lambda r: judging.latency(r, [FLOAT, W4], 5, 1), (), moments=2),
        Stage("report", lambda r: write_report(r.root), ("report.html",), moments=1),
    ]


class Killer:
    """Counts file operations; kills the process before the n-th."""

    def __init__(self, moment: int | None) -> None:
        self.moment = moment
        self.count = 0
        for name in _OPERATIONS:
            setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            self.count += 1
            if self.count == self.moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*arguments, **named)

        return counted


def in_child(stage: Stage, run: Path, moment: int | None = None) -> tuple[int, int]:
    """Run a stage in a child; return its exit status (negative: signal) and file operations."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reader)
            killer = Killer(moment)
            stage.run(RunFolder(run))
            os.write(writer, str(killer.count).encode())
            code = 0
        except BaseException:
            logging.exception("%s", stage.name)
        finally:
            sys.stdout.flush()
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        count = pipe.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), int(count or 0)


def contents(run: Path, artifacts: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in artifacts:
        path = run / name
        files = path.rglob("*") if path.is_dir() else [path] if path.exists() else []
        found |= {str(p.relative_to(run)): sha256_file(p) for p in files if p.is_file()}
    return found


def try_stage(stage: Stage, before: Path, work: Path, seed: int) -> dict[str, Any]:
    """Run a stage undisturbed, then killed and run again, always from the same earlier stages."""
    # One name for every attempt: the report shows it.
    run, whole = work / "attempt" / "run", work / stage.name
    shutil.copytree(before, run)
    stage.prepare(run)
    code, operations = in_child(stage, run)
    expected = contents(run, stage.artifacts)
    shutil.move(run, whole)
    names = {str(p.relative_to(whole)) for p in whole.rglob("*")}
    others = range(1, operations)
    drawn = random.Random(seed).sample(others, min(stage.moments - 1, len(others)))
    attempts = []
    for moment in sorted([*drawn, operations]):
        shutil.copytree(before, run)
        stage.prepare(run)
        killed, _ = in_child(stage, run, moment)
        again, _ = in_child(stage, run)
        found = {str(p.relative_to(run)) for p in run.rglob("*")}
        attempts.append(
            {
                "moment": moment,
                "killed": killed,
                "again": again,
                "same": contents(run, stage.artifacts) == expected,
                "leftovers": sorted(found ^ names),
            }
        )
        shutil.rmtree(run)
    return {
        "code": code,
        "operations": operations,
        "artifacts": sorted(expected),
        "attempts": attempts,
    }


def description(checkpoint: Path, policy: OftPolicy) -> dict[str, Any]:
    """What `qvla deploy` says about a run, without the date."""
    return {
        "policy": checkpoint.name,
        "policy_digest": policy.digest,
        "target": CPU.name,
        "settings": [FLOAT.name, W4.name],
        "command": "kill_stages.py",
        "created": "2026-01-01T00:00:00+00:00",
        "versions": versions(),
        "machine": {"cpu_model": "any", "cores": 1},
    }


def main(checkpoint: Path, dataset: Path, work: Path) -> None:
    torch.set_num_threads(1)
    for name in _LAZY:
        importlib.import_module(name)
    policy = load_oft_policy(checkpoint)
    # Traced once here, as `qvla deploy` does for all settings of a run.
    exporting._GRAPHS[policy.digest, CPU.name] = export_float(policy, CPU)
    # Every child measures memory, which collects first: not among what was imported here.
    gc.collect()
    gc.freeze()
    before = work / "empty"
    before.mkdir(parents=True)
    write_json(before / "run.json", description(checkpoint, policy))
    results = {}
    for seed, stage in enumerate(all_stages(checkpoint, dataset, policy)):
        results[stage.name] = try_stage(stage, before, work, seed)
        before = work / stage.name
    (work / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
