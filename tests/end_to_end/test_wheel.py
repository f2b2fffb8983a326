"""The wheel has every package and runs a bundle where only its base dependencies are."""

import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import pytest
from house import PACKAGES
from places import ROOT
from tiny_bundles import make_bundle, mixed_plan

from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.shared.observation import Observation

SOURCES = (*PACKAGES, "pyproject.toml", "README.md", "LICENSE")

# Runs in the clean environment.
_ACT = """
import importlib.util, sys
from pathlib import Path
import numpy as np
from engines.load import load_engine
from engines.verify import verify
from jetson.policy import EnginePolicy
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.observation import Observation

host = [name for name in ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "pyarrow")
        if importlib.util.find_spec(name)]
assert not host, host
assert Path(importlib.util.find_spec("jetson").origin).is_relative_to(sys.prefix)
bundle = Bundle.load(Path(sys.argv[1]))
with load_engine(bundle, threads=1) as engine:
    worst = verify(bundle, engine).drift.worst
    seen = Observation({"image": np.zeros((28, 28, 3), np.uint8)}, "push it", np.zeros(4))
    chunk = EnginePolicy(bundle, engine).infer(seen)
assert worst <= 1e-3, worst
assert chunk.actions.shape == (4, 4)
print("acted")
"""


def run(*command: str | Path, cwd: Path, timeout: float = 60) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build from a copy, so that no build/ or *.egg-info of the checkout takes part."""
    copy = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("data"))
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist"]
    run(*build, cwd=copy)
    (built,) = (copy / "dist").glob("*.whl")
    return built


def test_the_wheel_has_every_package_and_nothing_else(wheel: Path) -> None:
    names = set(ZipFile(wheel).namelist())
    sources = wheel.parents[1]
    files = {
        path for package in PACKAGES for path in (sources / package).rglob("*") if path.is_file()
    }
    modules = {str(path.relative_to(sources)) for path in files if path.suffix == ".py"}
    assert {name for name in names if name.endswith(".py")} == modules
    data = {
        str(path.relative_to(sources))
        for path in files
        if path.name == "py.typed" or path.suffix == ".j2" or path.parent.name == "static"
    }
    assert data >= {f"{package}/py.typed" for package in PACKAGES}
    assert "jetson/live/static/page.js" in data
    information = {name for name in names if ".dist-info/" in name}
    assert names - modules - information == data
    assert any(name.endswith("licenses/LICENSE") for name in information)


def test_the_wheel_needs_no_host_library(wheel: Path) -> None:
    archive = ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
    required = [
        line.split(":")[1].strip().lower()
        for line in archive.read(name).decode().splitlines()
        if line.startswith("Requires-Dist") and "extra ==" not in line
    ]
    host = ("torch", "transformers", "onnx>", "onnxscript", "onnx-ir", "pyarrow", "mujoco")
    assert required
    assert not [line for line in required if line.startswith(host)]


@pytest.mark.slow
def test_a_clean_environment_runs_a_bundle(
    wheel: Path,
    tiny_policy: OftPolicy,
    tiny_observations: Callable[..., list[Observation]],
    tmp_path: Path,
) -> None:
    """Installs the base dependencies, so it uses the network."""
    bundle = tmp_path / "bundle"
    make_bundle(tiny_policy, mixed_plan(tiny_policy), tiny_observations(3), bundle)
    venv.create(tmp_path / "robot", with_pip=True)
    programs = tmp_path / "robot" / "bin"
    install = [programs / "python", "-m", "pip", "install", "--quiet"]
    run(*install, "-c", ROOT / "constraints.txt", wheel, cwd=tmp_path, timeout=500)
    assert run(programs / "python", "-c", _ACT, bundle, cwd=tmp_path) == "acted\n"
    assert "serve" in run(programs / "qvla", "--help", cwd=tmp_path)
    run(programs / "qvla", "verify", bundle, cwd=tmp_path)
