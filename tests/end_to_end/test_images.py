"""The robot's container image, really built: small, and it verifies a bundle as its own user.

    QVLA_IMAGE_BASE=localhost/debian:12 pytest -m slow -s tests/end_to_end/test_images.py

The base lies in buildah's storage and can fetch packages, those of apt and those of pip.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from places import ROOT
from tiny_bundles import make_bundle, mixed_plan

from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.shared.observation import Observation

BASE = os.environ.get("QVLA_IMAGE_BASE")
IMAGE = "localhost/qvla-jetson-test"
MOST_BYTES = 400e6

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(shutil.which("buildah") is None, reason="needs buildah: Debian's buildah"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to look into an image"),
    pytest.mark.skipif(BASE is None, reason="needs a base image: QVLA_IMAGE_BASE"),
]


def buildah(*words: str | Path) -> str:
    done = subprocess.run(
        ["buildah", *map(str, words)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, f"{words[0]}: {done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout.strip()


@dataclass(frozen=True)
class Container:
    """A container of the image, and where its files lie."""

    name: str
    root: Path

    def run(self, *words: str, volumes: tuple[str, ...] = ()) -> str:
        """Run a command as the image's own user."""
        mounts = [f"--volume={volume}" for volume in volumes]
        return buildah("run", "--isolation=chroot", *mounts, self.name, "--", *words)


@pytest.fixture(scope="module")
def container() -> Iterator[Container]:
    buildah(
        "bud", "--isolation=chroot", "--format=docker", f"--build-arg=BASE={BASE}", "--tag", IMAGE,
        "--file", "docker/jetson.Dockerfile", ".",
    )  # fmt: skip
    name = buildah("from", IMAGE)
    try:
        yield Container(name, Path(buildah("mount", name)))
    finally:
        buildah("rm", name)
        buildah("rmi", IMAGE)


def test_the_robots_image_is_small(container: Container) -> None:
    said = subprocess.run(
        ["du", "--summarize", "--block-size=1", container.root],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    nbytes = int(said.stdout.split()[0])
    print(f"\nthe Jetson image on {BASE}: {nbytes / 1e6:.0f} MB")
    assert nbytes < MOST_BYTES
    # No compiler, nothing that installs, nothing of the host.
    packages = next(container.root.glob("opt/venv/lib/python3*/site-packages"))
    assert not [
        name for name in ("pip", "setuptools", "torch", "onnx") if (packages / name).exists()
    ]
    assert not list(container.root.glob("usr/bin/*gcc*"))


def test_the_robots_image_verifies_a_bundle(
    container: Container,
    tiny_policy: OftPolicy,
    tiny_observations: Callable[..., list[Observation]],
    tmp_path: Path,
) -> None:
    bundle = make_bundle(
        tiny_policy, mixed_plan(tiny_policy), tiny_observations(2), tmp_path / "bundle"
    )
    assert container.run("id", "-u") == "10001"
    assert container.run("qvla", "--version").startswith("qvla ")
    said = container.run("qvla", "verify", "/bundle", volumes=(f"{bundle.path}:/bundle:ro",))
    print(f"\n{said}")
    assert "verified: within" in said
    # What patches are applied with, and what engines' memory goes through, are whole.
    whole = "import zstandard, tokenizers, onnxruntime; from cuda.bindings import driver; print(1)"
    assert container.run("python3", "-c", whole) == "1"
