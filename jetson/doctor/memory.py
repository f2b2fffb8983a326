"""Memory and disk: what ends a build or a load although the policy would fit.

Contiguous memory: TensorRT's Myelin asks NvMap for about 1 GB of scratch at once. Where free memory
is in small pieces that fails ("NvMapMemAllocInternalTagged: 1075072515 error 12") and is reported
as "Could not find any implementation for node"; Jetson Linux 36.4.7 is worst, 36.5 mends part.
"""

from engines.trt.failures import COMPACT_MEMORY
from jetson.board.state import BoardState
from jetson.doctor.bundle_facts import NO_ORIN, BundleFacts
from jetson.doctor.finding import BoardFinding, Check
from jetson.doctor.machine import Machine
from jetson.doctor.power import NO_JETSON

# The weights of a 7B policy in 16 bits.
_LITTLE_BYTES = 16 << 30
# What the builder was seen to ask for at once.
_CONTIGUOUS_BYTES = 1_075_072_515
_CMA_SHARE = 0.25
# Of a kernel that keeps none.
_FIRST_CMA_MB = 512
_BAD_RELEASE = "36.4.7"
_MAKE_SWAP = (
    "sudo fallocate -l 16G /swapfile && sudo chmod 600 /swapfile && sudo mkswap /swapfile && "
    "sudo swapon /swapfile"
)
_SWAP = Check(
    "swap",
    "a build that runs out of memory is killed without a message",
    f"some on disk below {_LITTLE_BYTES >> 30} GiB of memory",
)
_CONTIGUOUS = Check(
    "contiguous memory",
    "TensorRT's builder asks for 1 GB at once; in pieces, kernels are 'not found'",
    f"{_CONTIGUOUS_BYTES / 1e9:.1f} GB in blocks of 1 MB or more",
)
_CMA = Check(
    "CMA memory", "cameras and codecs take their buffers from it", f"{_CMA_SHARE:.0%} of it free"
)
_RELEASE = Check(
    "Jetson Linux",
    f"{_BAD_RELEASE} fails large CUDA allocations although memory is free",
    f"not {_BAD_RELEASE}",
)
_AVAILABLE = Check("available memory", "loading or building ends where it is used up")
_DISK = Check("disk space", "engines are written whole beside the bundle")


def check_swap(board: BoardState) -> BoardFinding:
    """Look for swap on disk where there is little memory; compressed memory is none."""
    if board.memory_total_bytes is None or board.swap_total_bytes is None:
        return _SWAP.unknown("/proc/meminfo cannot be read", "free -h")
    zram = board.zram_bytes or 0
    on_disk = max(board.swap_total_bytes - zram, 0)
    shown = f"{_bytes(on_disk)} on disk" if on_disk else "none on disk"
    if zram:
        shown += f", {_bytes(zram)} compressed memory"
    shown += f"; {_bytes(board.memory_total_bytes)} of memory"
    if on_disk or board.memory_total_bytes >= _LITTLE_BYTES:
        return _SWAP.ok(shown)
    if zram and board.is_jetson:
        return _SWAP.warning(shown, f"sudo systemctl disable --now nvzramconfig; {_MAKE_SWAP}")
    return _SWAP.warning(shown, _MAKE_SWAP)


def check_contiguous(machine: Machine) -> BoardFinding:
    """Look whether a Jetson's free memory is in large pieces."""
    if not machine.board.is_jetson:
        return _CONTIGUOUS.inapplicable(NO_JETSON)
    nbytes = machine.large_blocks_bytes
    if nbytes is None:
        return _CONTIGUOUS.unknown("/proc/buddyinfo cannot be read", "sudo cat /proc/buddyinfo")
    board, shown = machine.board, _bytes(nbytes)
    if board.largest_free_block_bytes is not None:
        largest = board.largest_free_block_bytes >> 10
        shown += f", largest {board.largest_free_blocks} x {largest} KiB"
    if nbytes >= _CONTIGUOUS_BYTES:
        return _CONTIGUOUS.ok(shown)
    return _CONTIGUOUS.warning(
        shown,
        f"{COMPACT_MEMORY}; if that does not help: sudo reboot; if building fails after it, too: "
        f"{_double_cma(machine)}",
    )


def check_cma(machine: Machine) -> BoardFinding:
    """Look what is left of the memory that a Jetson's kernel keeps for devices."""
    if not machine.board.is_jetson:
        return _CMA.inapplicable(NO_JETSON)
    total, free = machine.cma_total_bytes, machine.cma_free_bytes
    if not total or free is None:
        return _CMA.inapplicable("the kernel keeps none")
    shown = f"{free / 1e6:.0f} of {total / 1e6:.0f} MB free"
    if free >= _CMA_SHARE * total:
        return _CMA.ok(shown)
    return _CMA.warning(shown, f"{COMPACT_MEMORY}; if it stays so: {_double_cma(machine)}")


def _double_cma(machine: Machine) -> str:
    """Return the command that has the kernel keep twice as much for devices, or a first share."""
    megabytes = 2 * (machine.cma_total_bytes or 0) >> 20 or _FIRST_CMA_MB
    return (
        f"keep {megabytes} MB for devices: sudo sed -i '/^[[:space:]]*APPEND/ s/$/ "
        f"cma={megabytes}M/' /boot/extlinux/extlinux.conf && sudo reboot"
    )


def check_release(board: BoardState) -> BoardFinding:
    """Look for the release of Jetson Linux that is known not to give memory."""
    if not board.is_jetson:
        return _RELEASE.inapplicable(NO_JETSON)
    if not board.l4t:
        return _RELEASE.unknown("the release is not stated", "cat /etc/nv_tegra_release")
    shown = f"{board.l4t}, JetPack {board.jetpack or 'unknown'}"
    if board.l4t != _BAD_RELEASE:
        return _RELEASE.ok(shown)
    return _RELEASE.warning(shown, "sudo apt update && sudo apt dist-upgrade", wanted="36.5")


def check_available(board: BoardState, facts: BundleFacts | None) -> BoardFinding:
    """Compare available memory with what loading takes, or building if that comes first."""
    if facts is None or facts.bundle is None:
        return _AVAILABLE.inapplicable("no bundle to load")
    if facts.is_for_another(board):
        return _AVAILABLE.inapplicable(NO_ORIN)
    needed, what = facts.memory_needed_bytes, facts.memory_needed_for
    wanted = f"{_bytes(needed)}: {what}"
    free = board.memory_available_bytes
    if free is None:
        return _AVAILABLE.unknown("/proc/meminfo cannot be read", "free -h")
    if free >= needed:
        return _AVAILABLE.ok(f"{_bytes(free)}, {_bytes(needed)} needed ({what})")
    headless = "; without a desktop: sudo systemctl isolate multi-user.target"
    smaller = f"{facts.build_command} --workspace-mb 1024; " if facts.must_build else ""
    return _AVAILABLE.error(
        _bytes(free), f"{smaller}end processes: ps aux --sort=-rss | head{headless}", wanted
    )


def check_disk(board: BoardState, facts: BundleFacts | None) -> BoardFinding:
    """Look for room for the engines of a bundle."""
    if facts is None or facts.bundle is None:
        return _DISK.inapplicable("no bundle to build engines of")
    if facts.is_for_another(board):
        return _DISK.inapplicable(NO_ORIN)
    if not facts.must_build:
        return _DISK.inapplicable("no engines are to be built")
    free, needed = facts.free_disk_bytes, facts.disk_needed_bytes
    if free is None:
        return _DISK.unknown(f"{facts.engines} cannot be reached", f"df -h {facts.shell_path}")
    if free >= needed:
        return _DISK.ok(f"{_bytes(free)}, {_bytes(needed)} needed")
    return _DISK.error(
        _bytes(free),
        f"qvla build {facts.shell_path} --output FOLDER_ON_A_LARGER_DISK, or find what to delete: "
        f"sudo du -xh --max-depth=2 / | sort -h | tail",
        wanted=_bytes(needed),
    )


def _bytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"
