"""The same builder's runtime on aarch64: a release installed, checked, activated and served."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from arm64_roots import SUITES
from emulated_robot import observations
from small_releases import Host
from tiny_bundles import make_bundle, mixed_plan

from jetson.policy import open_bundle
from jetson.serving.policy_contract import contract_of
from qvla_export.pipeline.runtime.robot_runtime import RuntimeRequest, build_runtime
from qvla_export.pipeline.runtime.robots import RobotSystem
from qvla_export.policies.oft.policy import OftPolicy
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


@pytest.mark.parametrize("suite", SUITES)
def test_a_release_acts_on_aarch64_as_it_does_here(
    tiny_policy: OftPolicy,
    tiny_observations: Callable[..., list[Observation]],
    tmp_path: Path,
    suite: str,
) -> None:
    system = SYSTEMS[suite]
    assert PLACE is not None and system.minor == SUITES[suite]
    root = tmp_path / "root"
    shutil.copytree(Path(PLACE) / suite, root, symlinks=True)
    build_runtime(RuntimeRequest(system, root / "opt" / "qvla.pex"))
    bundle = make_bundle(
        tiny_policy, mixed_plan(tiny_policy), tiny_observations(2), tmp_path / "bundle"
    )
    host = Host.new(tmp_path / "host")
    release = host.release(bundle.path, "mixed", drift=1e-3)
    shutil.copytree(host.repository.root, root / "opt" / "repository")
    shutil.copyfile(host.anchor, root / "opt" / "1.root.json")

    job = {
        "root": str(root),
        "emulator": str(Path(PLACE) / "qemu-aarch64"),
        "python": f"python{system.python}",
    }
    words = ["unshare", "--user", "--map-root-user", "--mount", "--net", "--pid", "--fork"]
    done = subprocess.run(
        [*words, sys.executable, HELPERS / "emulated_robot.py", json.dumps(job)],
        stdout=subprocess.PIPE,
    )
    assert done.returncode == 0
    said = json.loads(done.stdout)
    assert said["status"]["machine"]["architecture"] == "aarch64"
    assert said["verify"]["passed"] and said["verify"]["drift"] < 1e-3
    assert said["status"]["current"]["standing"] == "probation"
    assert said["bundle_digest"] == release.bundle_digest
    with open_bundle(bundle.path) as policy:
        contract = contract_of(policy)
        here = [policy.infer(one).actions for one in observations(contract, 3)]
    difference = np.abs(np.array(said["actions"]) - np.array(here)).max()
    print(f"\n{system.name}: largest difference to x86-64 {difference:.2e}")
    assert difference < 1e-5
    assert np.ptp(here) > 1e-2  # there is something to differ
