"""What goes wrong while engines are built and loaded, recognized from what the runtime says.

TensorRT reports the last thing that failed, which is seldom the reason: an allocation that the
kernel driver refused ends as "Could not find any implementation for node". Causes and cures are
those users reported; the sources are named in each.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_SHOWN = 5  # last messages quoted


@dataclass(frozen=True)
class Failure:
    """A kind of failure, how to tell it, and what to do."""

    # Matches one of the runtime's messages.
    pattern: str
    cause: str
    cures: tuple[str, ...]


# Puts free memory into large pieces.
COMPACT_MEMORY = (
    "sudo sh -c 'sync; echo 3 > /proc/sys/vm/drop_caches; echo 1 > /proc/sys/vm/compact_memory'"
)
_FREE_MEMORY = (
    f"reboot, or free contiguous memory: {COMPACT_MEMORY}",
    "close the desktop (sudo systemctl isolate multi-user.target) and other processes; stop a "
    "server that holds another engine",
    "build with less scratch memory: --workspace-mb 2048",
    "export in more, smaller parts: qvla export --layers-per-part 1; an output layer over a whole "
    "vocabulary is a part of its own then",
)
_LARGER_CMA = "have the kernel keep more memory in one piece (CMA): qvla doctor prints the command"

# The first that matches any message explains it: reasons before their consequences.
FAILURES: tuple[Failure, ...] = (
    Failure(
        r"NvMapMem\w*.*error 12|nvmap.*(ENOMEM|out of memory)",
        "the Jetson has no contiguous memory left for the builder's scratch buffers (NvMap error "
        "12); a message about a missing implementation is only its consequence",
        (*_FREE_MEMORY, _LARGER_CMA, "update Jetson Linux: 36.4.7 is the worst, 36.5 better"),
    ),
    Failure(
        r"(?i)out of memory|OutOfMemory|insufficient memory|cudaErrorMemoryAllocation|"
        r"Requested amount of GPU memory|std::bad_alloc|cudaError 2\b",
        "the memory of the device or the machine ran out",
        _FREE_MEMORY,
    ),
    Failure(
        r"graph_jit\.cpp.*CUDA_SUCCESS",
        "TensorRT for RTX compiles refittable and stripped engines on a GPU, and there is none",
        ("build on the machine with the GPU",),
    ),
    Failure(
        r"cudaError (35|100|999)\b|CUDA driver version is insufficient|no CUDA-capable device",
        "no usable NVIDIA driver or GPU",
        (
            "run where the GPU is; in a container: --runtime nvidia or --gpus all",
            "update the driver to one that this TensorRT supports",
        ),
    ),
    Failure(
        r"incompatible device|expecting compute|compute capability",
        "the engine was built for another GPU",
        ("build it on this machine: qvla build BUNDLE",),
    ),
    Failure(
        r"(?i)version tag|incompatible version|serialization.*version|engine was (generated|built)"
        r".*version",
        "the engine was built by another version of TensorRT",
        ("build it on this machine: qvla build BUNDLE",),
    ),
    Failure(
        r"Could not find any implementation for node \{?ForeignNode",
        "TensorRT found no kernel for a fused part; where memory is short this is what it says "
        "when a scratch buffer could not be had",
        (
            *_FREE_MEMORY,
            _LARGER_CMA,
            "if memory is plentiful: raise --level, or check the graph: qvla check",
        ),
    ),
    Failure(
        r"Could not find any implementation",
        "TensorRT has no kernel for this node in this type",
        ("check the graph against the target: qvla check", "raise --level to search more kernels"),
    ),
    Failure(
        r"(?i)strongly typed|types? .*must (be|match)|mismatched type",
        "element types do not fit together; a strongly typed network converts nothing by itself",
        ("export the bundle anew for this target; report the node",),
    ),
)


def find_failure(messages: Iterable[str]) -> Failure | None:
    """Return the failure that explains what a runtime said; None if it is not known."""
    lines = list(messages)
    for failure in FAILURES:
        if any(re.search(failure.pattern, line) for line in lines):
            return failure
    return None


def explain(what: str, messages: Sequence[str]) -> str:
    """Return an error message: what failed, why if it is known, cures, and the runtime's words.

    Args:
        what: "building part 'decoder' for target 'rtx4070' failed".
        messages: warnings and errors of the runtime, oldest first.
    """
    failure = find_failure(messages)
    quoted = "".join(f"\n  {line}" for line in messages[-_SHOWN:])
    said = f"\nTensorRT said:{quoted}" if quoted else "\nTensorRT gave no reason."
    if failure is None:
        return f"{what}; the reason is not one of the known ones.{said}"
    cures = "".join(f"\n- {cure}" for cure in failure.cures)
    return f"{what}: {failure.cause}. What helps:{cures}{said}"


def explain_kill(part: str) -> str:
    """Return what to say when an earlier build ended without a word: the kernel killed it."""
    cures = "".join(f"\n- {cure}" for cure in _FREE_MEMORY)
    return (
        f"the previous build of part {part!r} was killed while TensorRT was at work, most likely "
        f"for lack of memory (dmesg shows 'Out of memory'). If it happens again:{cures}"
    )
