"""The commands that flash a prepared BSP, or make an update of it; printed, or run on request.

What chooses between two systems is nvbootctl, on the robot: nothing here writes UEFI variables.
"""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from qvla_export.pipeline.flash.bsp import FLASH_TOOL, OTA_BOARDS, OTA_TOOL, Bsp
from qvla_export.pipeline.flash.overlay import Overlay
from qvla_export.pipeline.flash.refusal import FlashRefused
from qvla_export.pipeline.flash.storage import Storage, find_storage
from qvla_export.pipeline.progress import OnProgress, Progress, ignore

_SHOWN = 8
_BASE = re.compile(r"R\d{2}-\d")
# NVIDIA's USB devices in recovery mode: AGX Orin of 64 and of 32 GB.
_VENDOR, _PRODUCTS = "0955", {"7023": "AGX Orin 64 GB", "7223": "AGX Orin 32 GB"}
_PAYLOAD = "ota_payload_package.tar.gz"


@dataclass(frozen=True)
class FlashRequest:
    """What is done with a prepared BSP."""

    bsp: Path
    # Run the host's commands; else they are only returned.
    execute: bool = False
    # Jetson Linux that robots run now, "R36-4": an update for them instead of flashing.
    ota_from: str | None = None
    # BSP of that Jetson Linux; None where the target's own tools do.
    base_bsp: Path | None = None
    # Further words of NVIDIA's script.
    extra: tuple[str, ...] = ()
    # Below which this machine's /sys lies.
    machine: Path = field(default=Path("/"))


@dataclass(frozen=True)
class FlashCommand:
    """One command of flashing."""

    where: Literal["host", "robot"]
    why: str
    words: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """The command as it is typed."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join(["sudo", *variables, shlex.join(self.words)])


@dataclass(frozen=True)
class Flashing:
    """The commands of flashing, and whether the host's were run."""

    bsp: str
    overlay: Overlay
    commands: tuple[FlashCommand, ...]
    executed: bool

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "bsp": self.bsp,
            "board": self.overlay.board,
            "release": self.overlay.release,
            "executed": self.executed,
            "commands": [asdict(c) | {"line": c.line} for c in self.commands],
        }

    def lines(self) -> list[str]:
        """Return the commands, each under what it is for."""
        done = "run" if self.executed else "not run (--execute runs those of this machine)"
        return [
            f"{self.overlay.board}, release {self.overlay.release_name}: {done}",
            f"cd {shlex.quote(self.bsp)}",
            *(text for c in self.commands for text in (f"# {c.where}: {c.why}", c.line)),
        ]


def flash(request: FlashRequest, on_progress: OnProgress = ignore) -> Flashing:
    """Return, or run, what flashes a prepared BSP or makes an update of it.

    Raises:
        FlashRefused: it is not prepared, was changed since, no board waits, or a script failed.
    """
    bsp = Bsp.read(request.bsp.absolute())
    overlay = _require_overlay(bsp)
    bsp.require_board(overlay.board)
    storage = find_storage(bsp, overlay.device, overlay.rootfs_ab)
    if request.ota_from is None:
        bsp.require_tool(FLASH_TOOL, "unpack the BSP again")
        commands = _flash_commands(overlay, storage, request.extra)
    else:
        commands = _ota_commands(bsp, overlay, storage, request)
    if request.execute:
        if request.ota_from is None and "--no-flash" not in request.extra:
            _require_board_waiting(request.machine)
        for command in commands:
            if command.where == "host":
                on_progress(Progress(command.why))
                _run(bsp, command)
    return Flashing(str(bsp.root), overlay, commands, request.execute)


def _require_overlay(bsp: Bsp) -> Overlay:
    overlay = Overlay.load(bsp.root)
    if overlay is None or not overlay.release:
        raise FlashRefused("no overlay", f"{bsp.root} is not prepared yet; qvla flash prepare")
    if changed := overlay.changed(bsp.rootfs):
        raise FlashRefused(
            "changed overlay",
            f"{len(changed)} of its files are not as they were prepared, {list(changed[:_SHOWN])}; "
            "qvla flash prepare puts them back",
        )
    if overlay.l4t != bsp.l4t:
        raise FlashRefused(
            "changed overlay",
            f"it was prepared as Jetson Linux {overlay.l4t} and is {bsp.l4t} now; qvla flash "
            "prepare again",
        )
    return overlay


def _flash_commands(
    overlay: Overlay, storage: Storage, extra: Sequence[str]
) -> tuple[FlashCommand, ...]:
    words = [f"./{FLASH_TOOL}"]
    if storage.is_external:
        words += ["--external-device", storage.device, "-c", storage.layout]
        words += ["-p", f"-c {storage.boot_layout}"]
    words += _size(overlay)
    words += ["--showlogs", "--network", "usb0", *extra, overlay.board]
    words.append("external" if storage.is_external else "internal")
    return (
        FlashCommand("host", "writes a board in recovery mode", tuple(words), _systems(overlay)),
        *_slot_commands(overlay),
    )


def _ota_commands(
    bsp: Bsp, overlay: Overlay, storage: Storage, request: FlashRequest
) -> tuple[FlashCommand, ...]:
    base = str(request.ota_from)
    if _BASE.fullmatch(base) is None:
        raise FlashRefused("unknown base", f"--ota-from is R36-4 or the like, got {base!r:.40}")
    unpack = f"sudo tar xpf ota_tools_R{bsp.l4t}_aarch64.tbz2 -C {bsp.root.parent}"
    bsp.require_tool(OTA_TOOL, unpack)
    bsp.require_tool(OTA_BOARDS, unpack)
    listed = (bsp.root / OTA_BOARDS).read_text(errors="replace")
    name = overlay.board.replace("-", "_")
    if not re.search(rf"^\s*{re.escape(name)}_ota_", listed, re.M):
        raise FlashRefused(
            "wrong board",
            f"{overlay.board} is not in {OTA_BOARDS}: NVIDIA's updates are for the boards there; "
            "flash it by USB, or add its specification to that file",
        )
    environment = {**_systems(overlay), "TARGET_BSP": str(bsp.root)}
    if request.base_bsp is not None:
        environment["BASE_BSP"] = str(request.base_bsp.absolute())
    words = [f"./{OTA_TOOL}"]
    if storage.is_external:
        words += ["--external-device", storage.disk]
    words += [*_size(overlay), *request.extra, overlay.board, base]
    made = f"bootloader/{overlay.board}/{_PAYLOAD}"
    return (
        FlashCommand("host", f"makes {made}", tuple(words), environment),
        FlashCommand(
            "robot",
            f"after copying {made} to /ota and unpacking ota_tools_R{bsp.l4t}_aarch64.tbz2; then "
            "sudo reboot",
            ("./nv_ota_start.sh", f"/ota/{_PAYLOAD}"),
        ),
        *_slot_commands(overlay),
    )


def _slot_commands(overlay: Overlay) -> tuple[FlashCommand, ...]:
    """Return what says on the robot which of two boot chains, and systems, runs."""
    chains = FlashCommand("robot", "says which boot chain runs", ("nvbootctl", "dump-slots-info"))
    systems = FlashCommand(
        "robot", "says which system runs", ("nvbootctl", "-t", "rootfs", "dump-slots-info")
    )
    return (chains, systems) if overlay.rootfs_ab else (chains,)


def _size(overlay: Overlay) -> list[str]:
    return [] if overlay.app_gib is None else ["-S", f"{overlay.app_gib}GiB"]


def _systems(overlay: Overlay) -> dict[str, str]:
    return {"ROOTFS_AB": "1"} if overlay.rootfs_ab else {}


def _require_board_waiting(machine: Path) -> None:
    devices = machine / "sys/bus/usb/devices"
    nvidia = [
        (one.parent / "idProduct").read_text().strip()
        for one in sorted(devices.glob("*/idVendor"))
        if one.read_text().strip() == _VENDOR
    ]
    if not nvidia:
        raise FlashRefused(
            "no board in recovery mode",
            "no NVIDIA device on this machine's USB; connect the board's USB-C port beside the "
            "40-pin header, hold its recovery button, press and release reset, then look for "
            f"{_VENDOR}:7023 (64 GB) or {_VENDOR}:7223 (32 GB) in lsusb",
        )
    if not any(product in _PRODUCTS for product in nvidia):
        raise FlashRefused(
            "wrong board",
            f"USB has {[f'{_VENDOR}:{product}' for product in nvidia]}, an AGX Orin in recovery "
            f"mode is one of { {f'{_VENDOR}:{p}': name for p, name in _PRODUCTS.items()} }",
        )


def _run(bsp: Bsp, command: FlashCommand) -> None:
    # What it prints is its own; standard output is this command's answer.
    done = subprocess.run(
        command.words,
        cwd=bsp.root,
        env={**os.environ, **command.environment},
        stdout=sys.stderr,
        check=False,
    )
    if done.returncode != 0:
        raise FlashRefused(
            "failed script",
            f"{command.line} ended with {done.returncode}; its log is in {bsp.root / 'initrdlog'}",
        )
