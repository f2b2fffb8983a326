"""`prepare_bsp` on a miniature BSP: what is laid, laid again, and taken back."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from small_bsp import (
    reason_of,
    snapshot,
)
from small_releases import Host, sum_bundle

from jetson.install.installation import InstallRequest, install
from jetson.install.release import RefusedRelease
from jetson.install.store import Store, StoreError
from jetson.install.units import UnitSettings, unit_files
from qvla_export.pipeline.flash import preparation
from qvla_export.pipeline.flash.flashing import FlashRequest, flash
from qvla_export.pipeline.flash.overlay import MANIFEST, REPLACED, Entry, Overlay, lay
from qvla_export.pipeline.flash.preparation import (
    PrepareRequest,
    prepare_bsp,
    take_overlay_back,
)
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.shared.errors import ArtifactError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a root file system belongs to root")


def test_what_a_flashed_robot_gets(request_of: PrepareRequest) -> None:
    request = replace(request_of, power_mode=3, port=8777, pull_from="https://host/repository")
    rootfs = request.bsp / "rootfs"
    prepared = prepare_bsp(request)
    assert (prepared.jetpack, prepared.overlay.target) == ("7", "orin-jp7")
    program = rootfs / "opt/qvla/qvla.pex"
    assert program.read_bytes() == request.runtime.read_bytes() and os.access(program, os.X_OK)
    units = rootfs / "etc/systemd/system"
    settings = UnitSettings(Path("/opt/qvla/venv/bin/python"), port=8777, power_mode=3)
    for name, text in unit_files(settings).items():
        assert (units / name).read_text() == text
    started = {path.name for path in units.glob("*.wants/*")}
    assert started == {
        "qvla-first-boot.service", "qvla-clocks.service", "qvla-serve.service",
        "qvla-update.timer",
    }  # fmt: skip
    assert all(path.is_symlink() for path in units.glob("*.wants/*"))
    unpacks = (units / "qvla-first-boot.service.d/flashed.conf").read_text()
    assert "ExecStartPre=/opt/qvla/unpack\n" in unpacks
    # Each robot makes its own.
    assert (rootfs / "etc/machine-id").read_bytes() == b""
    assert not list(rootfs.glob("etc/ssh/ssh_host_*")) and (rootfs / "etc/ssh/sshd_config").exists()
    # The store is a robot's: it knows whom to trust and where to look, and holds the release.
    store = Store(rootfs / "var/lib/qvla")
    robot = json.loads(store.robot.read_text())
    assert (robot["repository"], robot["target"]) == ("https://host/repository", "orin-jp7")
    assert (store.trust / "anchor.json").read_bytes() == request.root.read_bytes()
    release = store.release(prepared.overlay.release)
    assert (release / "bundle").is_dir() and prepared.overlay.release_name == "pick-orin-jp7"
    # The manifest lists every file that was put there.
    laid = {one.path for one in prepared.overlay.files if one.kind != "absent"}
    there = {name for name in snapshot(rootfs) if not (rootfs / name).is_dir()}
    assert laid == there - {name for name in there if name in _mine()}
    assert not prepared.overlay.changed(rootfs) and not prepared.notes


def _mine() -> set[str]:
    return {
        "etc/passwd", "etc/nv_tegra_release", "etc/nvpmodel/nvpmodel_p3701_0000.conf",
        "etc/ssh/sshd_config",
    }  # fmt: skip


def test_what_starts_the_runtime(request_of: PrepareRequest, tmp_path: Path) -> None:
    """The laid scripts, in another place than /opt, with a runtime that unpacks itself."""
    prepare_bsp(request_of)
    rootfs, place = request_of.bsp / "rootfs", tmp_path / "opt"
    python = place / "pex/venvs/4/it/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@"\n')
    runtime_text = f"#!/bin/sh\necho once >> {place}/starts\necho {python.parents[1]}\n"
    for path, text in {
        "qvla.pex": runtime_text,
        "unpack": (rootfs / "opt/qvla/unpack").read_text(),
        "qvla": (rootfs / "usr/local/bin/qvla").read_text(),
    }.items():
        (place / path).write_text(text.replace("/opt/qvla", str(place)))
    for path in (python, *(place / name for name in ("qvla.pex", "unpack", "qvla"))):
        path.chmod(0o755)
    said = [
        subprocess.run([place / "qvla", *words], capture_output=True, text=True, check=True).stdout
        for words in (["robot", "status"], ["robot", "list"])
    ]
    assert said == ["-m qvla_export robot status\n", "-m qvla_export robot list\n"]
    # Unpacked once, where the server's account need not write.
    assert (place / "starts").read_text() == "once\n"


def test_a_second_preparation_changes_nothing(request_of: PrepareRequest) -> None:
    first = prepare_bsp(request_of)
    assert first.changed
    before = snapshot(request_of.bsp)
    second = prepare_bsp(request_of)
    assert second.changed == () and snapshot(request_of.bsp) == before
    assert second.overlay == first.overlay


def test_it_is_taken_back_whole(request_of: PrepareRequest) -> None:
    before = snapshot(request_of.bsp)
    prepare_bsp(request_of)
    assert snapshot(request_of.bsp) != before
    # Host keys of the image are among what was put aside.
    assert (request_of.bsp / REPLACED).stat().st_mode & 0o077 == 0
    take_overlay_back(request_of.bsp)
    assert snapshot(request_of.bsp) == before
    assert reason_of(lambda: take_overlay_back(request_of.bsp)) == "no overlay"


def test_another_request_leaves_nothing_of_the_first(request_of: PrepareRequest) -> None:
    rootfs = request_of.bsp / "rootfs"
    pulled = replace(request_of, pull_from="https://host/repository", user="arm")
    prepare_bsp(pulled)
    prepare_bsp(request_of)
    assert not list(rootfs.glob("etc/systemd/system/timers.target.wants/*"))
    assert "User=qvla\n" in (rootfs / "etc/systemd/system/qvla-serve.service").read_text()
    # A robot that was told of no repository says so, instead of looking on the host.
    store = Store(rootfs / "var/lib/qvla")
    with store.open(), pytest.raises(StoreError, match="not told yet where releases come from"):
        install(store, InstallRequest())


def test_a_newer_release_takes_the_place_of_the_older(
    request_of: PrepareRequest, published: Host, tiny_policy: OftPolicy, tmp_path: Path
) -> None:
    host = published.copy(tmp_path / "host")
    mine = replace(request_of, repository=host.repository.root)
    first = prepare_bsp(mine)
    sum_bundle(tiny_policy, tmp_path / "newer", 0.5, table=64, target="orin-jp7")
    newer = host.release(tmp_path / "newer", "newer")
    second = prepare_bsp(mine)
    releases = request_of.bsp / "rootfs/var/lib/qvla/releases"
    assert first.overlay.release != second.overlay.release == newer.digest
    assert [path.name for path in releases.iterdir()] == [newer.digest]
    # An image is never made of an older list than one that it was made of.
    with pytest.raises(RefusedRelease, match="rolled back"):
        prepare_bsp(request_of)


def test_an_interrupted_preparation_is_finished_or_taken_back(
    request_of: PrepareRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(request_of.bsp)

    def cut(bsp: Path, rootfs: Path, entries: list[Entry], overlay: Overlay | None) -> None:
        lay(bsp, rootfs, entries[: len(entries) // 2], overlay)
        lay(bsp, rootfs, [e for e in entries if e.path == "etc/machine-id"], overlay)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(preparation, "lay", cut)
        with pytest.raises(KeyboardInterrupt):
            prepare_bsp(request_of)
    # Not fit to be flashed, and known to be ours.
    assert reason_of(lambda: flash(FlashRequest(request_of.bsp))) == "no overlay"
    prepare_bsp(request_of)
    take_overlay_back(request_of.bsp)
    assert snapshot(request_of.bsp) == before


@pytest.mark.parametrize("damage", ["{", "[]", '{"format": "qvla-overlay-2"}'])
def test_a_damaged_manifest_is_refused(damage: str, request_of: PrepareRequest) -> None:
    (request_of.bsp / MANIFEST).write_text(damage)
    with pytest.raises(ArtifactError):
        prepare_bsp(request_of)


def test_a_manifest_does_not_remove_what_is_outside(request_of: PrepareRequest) -> None:
    prepare_bsp(request_of)
    path = request_of.bsp / MANIFEST
    value = json.loads(path.read_text())
    value["files"].append({"path": "../../victim", "kind": "file", "digest": "", "mode": 0})
    path.write_text(json.dumps(value))
    with pytest.raises(ArtifactError, match="leads out"):
        take_overlay_back(request_of.bsp)
