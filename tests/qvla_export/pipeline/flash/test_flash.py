"""`prepare_bsp` and `flash` on a miniature BSP: what is laid, refused, and would be run."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_runs import qvla
from small_bsp import (
    FLASH,
    NANO,
    ORIN,
    OTA_BOARDS,
    layout,
    new_bsp,
    runtime,
    snapshot,
    waiting_board,
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
from qvla_export.pipeline.flash.refusal import FlashRefused
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.shared.errors import ArtifactError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a root file system belongs to root")


@pytest.fixture(scope="module")
def published(tiny_policy: OftPolicy, tmp_path_factory: pytest.TempPathFactory) -> Host:
    host = Host.new(tmp_path_factory.mktemp("host"), root_keys=1, root_threshold=1)
    for i, target in enumerate(("orin-jp7", "orin-jp6", "cpu")):
        bundle = host.root / f"bundle-{target}"
        sum_bundle(tiny_policy, bundle, i / 8, table=64, target=target)
        host.release(bundle, f"pick-{target}")
    return host


@pytest.fixture
def request_of(published: Host, tmp_path: Path) -> PrepareRequest:
    return PrepareRequest(
        new_bsp(tmp_path / "Linux_for_Tegra"),
        published.repository.root,
        published.anchor,
        runtime(tmp_path / "qvla-jp7.pex"),
    )


def reason_of(act: Callable[[], object]) -> str:
    with pytest.raises(FlashRefused) as refused:
        act()
    assert str(refused.value).startswith(f"{refused.value.reason}: ")
    return refused.value.reason


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


def test_the_way_by_commands(request_of: PrepareRequest) -> None:
    bsp = request_of.bsp
    before = snapshot(bsp)
    prepared = qvla(
        "flash", "prepare", bsp, "--repository", request_of.repository, "--root", request_of.root,
        "--runtime", request_of.runtime, "--rootfs-ab", "--app-gib", 25, "--power-mode", 0,
    )  # fmt: skip
    assert prepared.code == 0, prepared.err
    assert "Jetson Linux 39.2.0 (JetPack 7)" in prepared.out and "0 changed" not in prepared.out
    shown = qvla("flash", "run", bsp, "--", "--no-flash")
    assert shown.code == 0 and "not run" in shown.out
    assert f"sudo ROOTFS_AB=1 ./{FLASH}" in shown.out and "--no-flash" in shown.out
    said = json.loads(qvla("flash", "run", bsp, "--ota-from", "R36-4", "--json").out)
    assert [c["where"] for c in said["commands"]] == ["host", "robot", "robot", "robot"]
    wrong = qvla("flash", "run", bsp, "--ota-from", "36")
    assert (wrong.code, wrong.error[:20]) == (2, "error: unknown base:")
    assert qvla("flash", "undo", bsp).code == 0 and snapshot(bsp) == before


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


def change(path: Path, text: str | None) -> None:
    if text is None:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


# What is wrong with a BSP -> the file, what it says then, and the reason's name.
DAMAGE: dict[str, tuple[str, str | None, str]] = {
    "no version": ("nv_tegra/bsp_version", None, "no bsp"),
    "no number": ("nv_tegra/bsp_version", "BSP_BRANCH=thirty\n", "no bsp"),
    "no bootloader": ("bootloader", None, "no bsp"),
    "no kernel": ("kernel/Image", None, "missing kernel"),
    "no system": ("rootfs/etc/passwd", None, "missing rootfs"),
    "no packages": ("rootfs/etc/nv_tegra_release", None, "binaries not applied"),
    "other packages": (
        "rootfs/etc/nv_tegra_release", "# R36 (release), REVISION: 4.3, x", "binaries not applied",
    ),
    "no script": (FLASH, None, "missing tool"),
    "no layout": ("tools/kernel_flash/flash_l4t_t234_nvme.xml", None, "missing layout"),
    "no XML": ("tools/kernel_flash/flash_l4t_t234_nvme.xml", "<a>", "missing layout"),
    "no APP": ("tools/kernel_flash/flash_l4t_t234_nvme.xml", layout("UDA"), "missing layout"),
    "no QSPI": ("bootloader/generic/cfg/flash_t234_qspi.xml", None, "missing layout"),
    "small APP": (
        "tools/kernel_flash/flash_l4t_t234_nvme.xml", layout("APP", app_bytes="64"), "no space",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGE)
def test_a_bsp_that_lacks_something(what: str, request_of: PrepareRequest) -> None:
    name, text, reason = DAMAGE[what]
    change(request_of.bsp / name, text)
    before = snapshot(request_of.bsp)
    assert reason_of(lambda: prepare_bsp(request_of)) == reason
    assert snapshot(request_of.bsp) == before


# What is asked for -> the reason's name and a word of the message.
WISHES: dict[str, tuple[dict[str, Any], str, str]] = {
    "a Nano": ({"board": NANO}, "wrong board", ORIN),
    "an Orin as an NX": ({"board": f"{ORIN}-as-nx-16gb"}, "wrong board", ORIN),
    "no board": ({"board": "jetson-agx-xavier-devkit"}, "wrong board", "no configuration"),
    "a path": ({"board": f"../Linux_for_Tegra/{ORIN}"}, "wrong board", ORIN),
    "a disk": ({"storage": "sda1"}, "wrong storage", "nvme0n1p1"),
    "a whole drive": ({"storage": "nvme0n1"}, "wrong storage", "nvme0n1p1"),
    "eMMC twice": ({"storage": "mmcblk0p1", "rootfs_ab": True}, "missing layout", "rootfs-ab"),
    "a mode": ({"power_mode": 9}, "wrong power mode", "MODE_50W"),
    "JetPack 6's": ({"target": "orin-jp6"}, "wrong jetpack", "39.2.0"),
    "its release": ({"release": "pick-orin-jp6"}, "wrong jetpack", "JetPack 7"),
    "none such": ({"target": "rtx4070"}, "wrong jetpack", "orin-jp7"),
}  # fmt: skip


@pytest.mark.parametrize("what", WISHES)
def test_what_does_not_fit_is_refused(what: str, request_of: PrepareRequest) -> None:
    changes, reason, word = WISHES[what]
    with pytest.raises(FlashRefused, match=word) as refused:
        prepare_bsp(replace(request_of, **changes))
    assert refused.value.reason == reason
    overlay = Overlay.load(request_of.bsp)
    assert overlay is None or not overlay.release


@pytest.mark.parametrize("l4t", ["36.3.0", "38.4.0", "35.5.0", "40.1.0"])
def test_a_jetson_linux_without_a_target(l4t: str, request_of: PrepareRequest) -> None:
    shutil.rmtree(request_of.bsp)
    new_bsp(request_of.bsp, l4t)
    assert reason_of(lambda: prepare_bsp(request_of)) == "wrong jetpack"


def test_jetpack_6_wants_its_own(request_of: PrepareRequest, tmp_path: Path) -> None:
    shutil.rmtree(request_of.bsp)
    new_bsp(request_of.bsp, "36.4.3")
    assert reason_of(lambda: prepare_bsp(request_of)) == "wrong runtime"
    older = replace(request_of, runtime=runtime(tmp_path / "jp6.pex", "6", "1.23.0"))
    assert prepare_bsp(older).overlay.release_name == "pick-orin-jp6"
    # What its Python has no ONNX Runtime for.
    assert reason_of(lambda: prepare_bsp(replace(older, target="cpu"))) == "wrong jetpack"
    take_overlay_back(request_of.bsp)
    newer = runtime(tmp_path / "own.pex", "6", "1.32.0", own_python_sha256="ab" * 32)
    prepared = prepare_bsp(replace(older, target="cpu", runtime=newer))
    assert prepared.overlay.target == "cpu" and "Python" in prepared.notes[0]


def test_a_runtime_is_what_is_described(request_of: PrepareRequest) -> None:
    request_of.runtime.write_bytes(b"something else")
    assert reason_of(lambda: prepare_bsp(request_of)) == "wrong runtime"
    request_of.runtime.with_suffix(".json").write_text("[]")
    assert reason_of(lambda: prepare_bsp(request_of)) == "wrong runtime"
    request_of.runtime.with_suffix(".json").unlink()
    with pytest.raises(ArtifactError, match="description of the runtime"):
        prepare_bsp(request_of)


def test_a_rootfs_unpacked_without_sudo(request_of: PrepareRequest) -> None:
    os.chown(request_of.bsp / "rootfs", 1000, 1000)
    assert reason_of(lambda: prepare_bsp(request_of)) == "not root's"


def test_a_store_of_somebody_else_stays(request_of: PrepareRequest) -> None:
    (request_of.bsp / "rootfs/var/lib/qvla").mkdir()
    assert reason_of(lambda: prepare_bsp(request_of)) == "foreign file"


def test_nobody_to_log_in_is_said(request_of: PrepareRequest) -> None:
    (request_of.bsp / "rootfs/etc/passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    assert "l4t_create_default_user.sh" in prepare_bsp(request_of).notes[0]


@pytest.mark.parametrize("name", ["opt", "var/lib", "etc/systemd"])
def test_a_link_of_the_rootfs_does_not_lead_to_this_machine(
    name: str, request_of: PrepareRequest, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    place = request_of.bsp / "rootfs" / name
    if place.is_dir():
        shutil.rmtree(place)
    place.symlink_to(outside)
    assert reason_of(lambda: prepare_bsp(request_of)) == "foreign file"
    assert not list(outside.iterdir())


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


def test_a_changed_overlay_is_neither_flashed_nor_taken_back(request_of: PrepareRequest) -> None:
    prepare_bsp(request_of)
    unit = request_of.bsp / "rootfs/etc/systemd/system/qvla-serve.service"
    kept = unit.read_text()
    unit.write_text("something else")
    assert reason_of(lambda: flash(FlashRequest(request_of.bsp))) == "changed overlay"
    assert reason_of(lambda: take_overlay_back(request_of.bsp)) == "changed overlay"
    assert prepare_bsp(request_of).changed == ("etc/systemd/system/qvla-serve.service",)
    assert unit.read_text() == kept and flash(FlashRequest(request_of.bsp)).commands


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


@pytest.mark.parametrize(
    ("changes", "environment", "words"),
    [
        (
            {},
            [],
            "--external-device nvme0n1p1 -c tools/kernel_flash/flash_l4t_t234_nvme.xml -p "
            "'-c bootloader/generic/cfg/flash_t234_qspi.xml' --showlogs --network usb0 "
            f"{ORIN} external",
        ),
        (
            {"rootfs_ab": True, "app_gib": 25},
            ["ROOTFS_AB=1"],
            "--external-device nvme0n1p1 -c tools/kernel_flash/flash_l4t_t234_nvme_rootfs_ab.xml "
            "-p '-c bootloader/generic/cfg/flash_t234_qspi.xml' -S 25GiB --showlogs --network usb0 "
            f"{ORIN} external",
        ),
        ({"storage": "mmcblk0p1"}, [], f"--showlogs --network usb0 {ORIN} internal"),
    ],
)
def test_the_command_that_flashes(
    changes: dict[str, Any],
    environment: list[str],
    words: str,
    request_of: PrepareRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = tmp_path / "record"
    monkeypatch.setenv("RECORD", str(record))
    prepare_bsp(replace(request_of, **changes))
    plan = flash(FlashRequest(request_of.bsp))
    line = plan.commands[0].line
    assert line == " ".join(["sudo", *environment, f"./{FLASH}", words])
    # Nothing ran; slots are asked of nvbootctl alone.
    assert not record.exists() and not plan.executed
    slots = [c.words for c in plan.commands if c.where == "robot"]
    assert slots and all(words[0] == "nvbootctl" for words in slots)
    machine = waiting_board(tmp_path / "machine", "7023")
    assert flash(FlashRequest(request_of.bsp, execute=True, machine=machine)).executed
    said = record.read_text().splitlines()
    assert said == [str(request_of.bsp), *environment, *plan.commands[0].words[1:]]


def test_an_update_for_robots_that_run(
    request_of: PrepareRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "record"
    monkeypatch.setenv("RECORD", str(record))
    prepare_bsp(replace(request_of, rootfs_ab=True, app_gib=25))
    wish = FlashRequest(request_of.bsp, ota_from="R36-4", base_bsp=tmp_path / "base", execute=True)
    made = flash(wish)
    assert sorted(record.read_text().splitlines()[:4]) == sorted(
        [str(request_of.bsp), "ROOTFS_AB=1", f"BASE_BSP={tmp_path / 'base'}",
         f"TARGET_BSP={request_of.bsp}"]
    )  # fmt: skip
    assert record.read_text().splitlines()[4:] == [
        "--external-device", "nvme0n1", "-S", "25GiB", ORIN, "R36-4"
    ]  # fmt: skip
    assert [c.where for c in made.commands] == ["host", "robot", "robot", "robot"]
    assert reason_of(lambda: flash(replace(wish, ota_from="36.4"))) == "unknown base"
    (request_of.bsp / OTA_BOARDS).write_text("jetson_orin_nano_devkit_ota_nvme_r36_spec=(\n)\n")
    assert reason_of(lambda: flash(wish)) == "wrong board"
    (request_of.bsp / OTA_BOARDS).unlink()
    assert reason_of(lambda: flash(wish)) == "missing tool"


def test_a_board_must_wait_and_be_the_right_one(
    request_of: PrepareRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "record"
    monkeypatch.setenv("RECORD", str(record))
    prepare_bsp(request_of)
    wish = FlashRequest(request_of.bsp, execute=True, machine=tmp_path / "machine")
    assert reason_of(lambda: flash(wish)) == "no board in recovery mode"
    waiting_board(wish.machine, "7323")  # an Orin NX
    assert reason_of(lambda: flash(wish)) == "wrong board"
    assert not record.exists()
    # Images without a board.
    assert flash(replace(wish, extra=("--no-flash",))).executed
    assert "--no-flash" in record.read_text().splitlines()
    waiting_board(wish.machine, "7223")
    monkeypatch.setenv("FAILS", "7")
    with pytest.raises(FlashRefused, match="ended with 7") as refused:
        flash(wish)
    assert refused.value.reason == "failed script"
