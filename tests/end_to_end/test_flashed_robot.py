"""The first boot of a root file system that was prepared for flashing, under a systemd that boots.

Its programs are this machine's, not aarch64's, so its runtime is one that unpacks this machine's
Python; what is laid around it is what a board gets.
"""

import os
import subprocess
from pathlib import Path

import pytest
from booted_robot import UNPACKED, FlashedRobot, lacking
from small_bsp import new_bsp, runtime
from small_releases import Host, sum_bundle
from systemd_roots import SUITES

from qvla_export.pipeline.flash.preparation import PrepareRequest, prepare_bsp
from qvla_export.policies.oft.policy import OftPolicy

PLACE = os.environ.get("QVLA_SYSTEMD")
_RUNTIME = f'#!/bin/sh\nexec {UNPACKED}/bin/python "$@"\n'

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        PLACE is None, reason="needs systems with systemd: see tests/helpers/systemd_roots.py"
    ),
    pytest.mark.skipif(lacking() is not None, reason=str(lacking())),
]


@pytest.mark.parametrize("suite", sorted(SUITES))
def test_a_flashed_robot_serves_from_its_first_boot(
    tiny_policy: OftPolicy, tmp_path: Path, suite: str
) -> None:
    assert PLACE is not None
    for folder in (tmp_path, *list(tmp_path.parents)[:3]):
        if folder.stat().st_uid == os.getuid() and folder != Path("/tmp"):
            folder.chmod(0o755)  # the account that serves looks into it
    host = Host.new(tmp_path / "host")
    bundle = sum_bundle(tiny_policy, tmp_path / "bundle", table=64, servable=True)
    host.release(bundle.path, "pick")
    bsp = new_bsp(tmp_path / "Linux_for_Tegra")
    rootfs = bsp / "rootfs"
    # With owners and devices, as a root file system is unpacked into a BSP.
    subprocess.run(["cp", "--archive", f"{PLACE}/{suite}/.", rootfs], check=True)
    prepare_bsp(
        PrepareRequest(
            bsp, host.repository.root, host.anchor,
            runtime(tmp_path / "qvla-jp7.pex", text=_RUNTIME), power_mode=0, target="cpu",
        )
    )  # fmt: skip
    robot = FlashedRobot(rootfs, tmp_path / "robot")
    try:
        robot.boot()
        robot.until(lambda: (robot.store / "first-boot-done").exists())
        digest = robot.qvla("list")["releases"][0]["digest"]
        robot.until(lambda: robot.qvla("status")["current"]["standing"] == "proven")
        assert robot.store.joinpath("current").resolve().name == digest
        calls = (robot.log / "calls").read_text().split("\n")
        assert calls[:2] == ["nvpmodel -m 0", "jetson_clocks"]
        assert robot.call("stat", "-c", "%U", f"/proc/{robot.server()}").stdout == "qvla\n"
        assert robot.systemctl("list-units", "--failed", "--no-legend") == ""
        # An identity of its own, and nothing of the image's.
        assert len((rootfs / "etc/machine-id").read_text().strip()) == 32
        key = (rootfs / "etc/ssh/ssh_host_ed25519_key").read_text()
        assert key.startswith("-----BEGIN OPENSSH PRIVATE KEY-----")
        # It serves again after a restart, and the first boot is over.
        robot.restart()
        with robot.watched() as seen:
            robot.until(lambda: seen.serves(bundle.digest, 0.0))
        assert robot.qvla("status")["current"]["standing"] == "proven"
        assert (robot.log / "calls").read_text().count("nvpmodel") == 1
    finally:
        robot.end()
