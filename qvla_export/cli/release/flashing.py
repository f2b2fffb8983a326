"""`qvla flash`: a BSP of Jetson Linux with a release on it, and the commands that flash it."""

from pathlib import Path
from typing import Annotated

import typer

from qvla_export.cli.options import A_FILE, Existing, JsonOption
from qvla_export.cli.progress import print_result, progress_shown
from qvla_export.cli.release.releases import A_ROOT

A_BSP = Existing("BSP", "unpack it: sudo tar xpf Jetson_Linux_R*_aarch64.tbz2")
A_RUNTIME = Existing("runtime", "make it first with: qvla runtime build")
BspArgument = Annotated[Path, typer.Argument(help="Linux_for_Tegra.", callback=A_BSP.require)]


def prepare(
    bsp: BspArgument,
    repository: Annotated[Path, typer.Option(help="Of releases.", callback=A_FILE.require)],
    root: Annotated[Path, typer.Option(help="Root of the keys.", callback=A_ROOT.require)],
    runtime: Annotated[Path, typer.Option(help="The robots' .pex.", callback=A_RUNTIME.require)],
    board: Annotated[str, typer.Option(help="Name of the BSP's .conf.")] = "jetson-agx-orin-devkit",
    storage: Annotated[str, typer.Option(help="nvme0n1p1, or mmcblk0p1.")] = "nvme0n1p1",
    rootfs_ab: Annotated[bool, typer.Option("--rootfs-ab", help="Two systems.")] = False,
    app_gib: Annotated[int | None, typer.Option(min=1, help="Of a system, GiB.")] = None,
    release: Annotated[str | None, typer.Option(help="Name; default: the newest.")] = None,
    target: Annotated[str | None, typer.Option(help="Default: of the BSP's JetPack.")] = None,
    pull_from: Annotated[str | None, typer.Option(help="URL that a timer pulls from.")] = None,
    power_mode: Annotated[int | None, typer.Option(min=0, help="nvpmodel's mode.")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of the server.")] = 8000,
    as_json: JsonOption = False,
) -> None:
    """Check a BSP and put runtime, units, trusted keys and a release on its root file system."""
    from qvla_export.pipeline.flash.preparation import PrepareRequest, prepare_bsp

    request = PrepareRequest(
        bsp, repository, root, runtime, board, storage, rootfs_ab, app_gib, release, target,
        pull_from, power_mode, port,
    )  # fmt: skip
    with progress_shown(silent=as_json) as on_progress:
        prepared = prepare_bsp(request, on_progress)
    print_result(prepared, prepared.lines(), as_json)


def undo(bsp: BspArgument) -> None:
    """Let a BSP's root file system be what it was before it was prepared."""
    from qvla_export.pipeline.flash.preparation import take_overlay_back

    overlay = take_overlay_back(bsp)
    typer.echo(f"taken back: {len(overlay.files)} paths of release {overlay.release_name}")


def run(
    bsp: BspArgument,
    extra: Annotated[list[str] | None, typer.Argument(help="Words of NVIDIA's script.")] = None,
    execute: Annotated[bool, typer.Option("--execute", help="Run them; else print.")] = False,
    ota_from: Annotated[str | None, typer.Option(help="Update robots of R36-4, say.")] = None,
    base_bsp: Annotated[
        Path | None, typer.Option(help="Their BSP.", callback=A_FILE.require)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Print the commands that flash a prepared BSP, or run them."""
    from qvla_export.pipeline.flash.flashing import FlashRequest, flash

    request = FlashRequest(bsp, execute, ota_from, base_bsp, tuple(extra or ()))
    with progress_shown(silent=as_json) as on_progress:
        flashing = flash(request, on_progress)
    print_result(flashing, flashing.lines(), as_json)
