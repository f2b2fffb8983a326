"""`flash` of a prepared miniature BSP, and the commands: what would be run, and when."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_runs import qvla
from small_bsp import (
    FLASH,
    ORIN,
    OTA_BOARDS,
    reason_of,
    snapshot,
    waiting_board,
)

from qvla_export.pipeline.flash.flashing import FlashRequest, flash
from qvla_export.pipeline.flash.preparation import (
    PrepareRequest,
    prepare_bsp,
    take_overlay_back,
)
from qvla_export.pipeline.flash.refusal import FlashRefused

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a root file system belongs to root")


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


def test_a_changed_overlay_is_neither_flashed_nor_taken_back(request_of: PrepareRequest) -> None:
    prepare_bsp(request_of)
    unit = request_of.bsp / "rootfs/etc/systemd/system/qvla-serve.service"
    kept = unit.read_text()
    unit.write_text("something else")
    assert reason_of(lambda: flash(FlashRequest(request_of.bsp))) == "changed overlay"
    assert reason_of(lambda: take_overlay_back(request_of.bsp)) == "changed overlay"
    assert prepare_bsp(request_of).changed == ("etc/systemd/system/qvla-serve.service",)
    assert unit.read_text() == kept and flash(FlashRequest(request_of.bsp)).commands


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
