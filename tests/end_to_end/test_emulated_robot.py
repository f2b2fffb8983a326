"""The same builder's runtime on aarch64: a release carried to actions, engines built."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arm64_roots import SUITES, TENSORRT, TENSORRT_SUITE
from emulated_robot import observations
from small_releases import Host
from tiny_bundles import make_bundle, mixed_plan

from engines.targets import RTX4070
from jetson.policy import open_bundle
from jetson.serving.policy_contract import contract_of
from qvla_export.graph.export import ExportOptions, export_bundle
from qvla_export.pipeline.runtime.robot_runtime import RuntimeRequest, build_runtime
from qvla_export.pipeline.runtime.robots import RobotSystem
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.quantizer.quantize import spec_for
from qvla_export.shared.observation import Observation

HELPERS = Path(__file__).resolve().parents[1] / "helpers"
PLACE = os.environ.get("QVLA_ARM64")
# JetPack's own Pythons exist for no Debian: these stand on both sides of 3.12.
SYSTEMS = {
    "bookworm": RobotSystem(
        "Debian 12", 11, {"GLIBC": (2, 36), "GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13)}
    ),
    "trixie": RobotSystem(
        "Debian 13", 13, {"GLIBC": (2, 41), "GLIBCXX": (3, 4, 33), "CXXABI": (1, 3, 15)}
    ),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        PLACE is None, reason="needs systems for aarch64: see tests/helpers/arm64_roots.py"
    ),
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in ("pex", "uv")),
        reason="needs the extra runtime: pip install 'qvla[runtime]'",
    ),
]


@dataclass(frozen=True)
class Robot:
    """A system with its runtime in it."""

    system: RobotSystem
    root: Path

    def do(self, what: str) -> Any:
        """Let it serve or build; return what it said."""
        job = {
            "what": what,
            "root": str(self.root),
            "emulator": f"{PLACE}/qemu-aarch64",
            "python": f"python{self.system.python}",
        }
        words = ["unshare", "--user", "--map-root-user", "--mount", "--net", "--pid", "--fork"]
        done = subprocess.run(
            [*words, sys.executable, HELPERS / "emulated_robot.py", json.dumps(job)],
            stdout=subprocess.PIPE,
            check=False,
        )
        assert done.returncode == 0
        return json.loads(done.stdout)


@pytest.fixture
def robot(request: pytest.FixtureRequest, tmp_path: Path) -> Robot:
    """A robot of one suite of Debian."""
    suite = request.param
    system, root = SYSTEMS[suite], tmp_path / "root"
    assert PLACE is not None and system.minor == SUITES[suite]
    shutil.copytree(Path(PLACE) / suite, root, symlinks=True)
    build_runtime(RuntimeRequest(system, root / "opt" / "qvla.pex"))
    return Robot(system, root)


@pytest.mark.parametrize("robot", SUITES, indirect=True)
def test_a_release_acts_on_aarch64_as_it_does_here(
    robot: Robot,
    tiny_policy: OftPolicy,
    tiny_observations: Callable[..., list[Observation]],
    tmp_path: Path,
) -> None:
    bundle = make_bundle(
        tiny_policy, mixed_plan(tiny_policy), tiny_observations(2), tmp_path / "bundle"
    )
    host = Host.new(tmp_path / "host")
    release = host.release(bundle.path, "mixed", drift=1e-3)
    shutil.copytree(host.repository.root, robot.root / "opt" / "repository")
    shutil.copyfile(host.anchor, robot.root / "opt" / "1.root.json")
    said = robot.do("serve")
    assert said["status"]["machine"]["architecture"] == "aarch64"
    assert said["verify"]["passed"] and said["verify"]["drift"] < 1e-3
    assert said["status"]["current"]["standing"] == "probation"
    assert said["bundle_digest"] == release.bundle_digest
    with open_bundle(bundle.path) as policy:
        contract = contract_of(policy)
        here = [policy.infer(one).actions for one in observations(contract, 3)]
    difference = np.abs(np.array(said["actions"]) - np.array(here)).max()
    print(f"\n{robot.system.name}: largest difference to x86-64 {difference:.2e}")
    assert difference < 1e-5
    assert np.ptp(here) > 1e-2  # there is something to differ


@pytest.mark.skipif(
    not Path(f"{PLACE}/{TENSORRT}").is_dir(), reason="needs TensorRT for RTX: arm64_roots.py"
)
@pytest.mark.parametrize("robot", [TENSORRT_SUITE], indirect=True)
def test_a_policys_engines_are_built_on_aarch64(
    robot: Robot, tiny_policy: OftPolicy, tiny_observations: Callable[..., list[Observation]]
) -> None:
    """By the parser and the builder of TensorRT for RTX; nothing here runs an engine."""
    packages = robot.root / "usr/lib/python3/dist-packages"
    shutil.copytree(f"{PLACE}/{TENSORRT}", packages, dirs_exist_ok=True)
    plan = replace(
        mixed_plan(tiny_policy),
        target=RTX4070.name,
        containers=dict(RTX4070.containers),
        quantizer=spec_for(RTX4070),
    )
    path = robot.root / "opt" / "bundle"
    bundle = export_bundle(
        tiny_policy, plan, RTX4070, tiny_observations(2), path, ExportOptions(layers_per_part=1)
    )
    said = robot.do("build")
    print(f"\n{robot.system.name}: {said}")
    engines = {path.stem: path.stat().st_size for path in robot.root.rglob("*.engine")}
    assert set(engines) == {part.name for part in bundle.parts} and len(engines) >= 5
    weights = sum(path.stat().st_size for path in bundle.path.glob("*.onnx*"))
    assert min(engines.values()) > 10_000 and sum(engines.values()) > weights
