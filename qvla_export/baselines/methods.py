"""The baselines that can be asked for: whose code makes each, and what it stands for.

Of "qvla_export" are those that no kept library has: re-implemented or simulated here, named so.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from qvla_export.shared.errors import QvlaError

Library = Literal["modelopt", "llmcompressor", "auto_round", "qvla_export"]


@dataclass(frozen=True)
class Method:
    """One post-training method of one library, or of our own hands."""

    name: str
    # Module that is imported, and the distributions whose versions are recorded.
    library: Library
    distributions: tuple[str, ...]
    # What a paper's table calls it.
    stands_for: str
    # Widths of weights it is run at, and of inputs; None leaves inputs in float.
    bits: tuple[int, ...]
    activation_bits: tuple[int | None, ...] = (None,)

    @property
    def installed_apart(self) -> bool:
        """Whether it needs an environment of its own."""
        return self.library != "qvla_export"


_MODELOPT = ("nvidia-modelopt",)
_LLMCOMPRESSOR = ("llmcompressor", "compressed-tensors")
_OURS = ("torch",)
METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(
            "max",
            "modelopt",
            _MODELOPT,
            "INT8 and INT4 max calibration (round to nearest)",
            (2, 3, 4, 8),
            (None, 8, 4),
        ),
        # modelopt 0.47 migrates scales of 8-bit weights and inputs only.
        Method("smoothquant", "modelopt", _MODELOPT, "SmoothQuant", (8,), (8,)),
        Method("awq", "modelopt", _MODELOPT, "AWQ", (2, 3, 4, 8)),
        Method("gptq", "llmcompressor", _LLMCOMPRESSOR, "GPTQ", (2, 3, 4, 8)),
        Method(
            "hadamard-gptq",
            "llmcompressor",
            _LLMCOMPRESSOR,
            "GPTQ of inputs rotated in Hadamard blocks (as QuaRot and HoloQ; re-implemented)",
            (2, 3, 4, 8),
        ),
        Method(
            "auto-round",
            "auto_round",
            ("auto-round",),
            "OmniQuant's class: rounding and clipping learned block by block",
            (2, 3, 4, 8),
        ),
        Method(
            "fisher",
            "qvla_export",
            _OURS,
            "scales of the least error that the action feels (as ActQuant; re-implemented)",
            (2, 3, 4, 8),
        ),
        Method("sign", "qvla_export", _OURS, "a simulated width of 1 bit: signs", (1,)),
    )
}


@dataclass(frozen=True)
class BaselineRequest:
    """A method at one width.

    Raises:
        QvlaError: no such method, or it is not run at this width.
    """

    method: str
    bits: int
    # None leaves the layers' inputs in float.
    activation_bits: int | None = None
    # Consecutive inputs that share a scale; None for one scale per channel.
    group_size: int | None = None
    # Bits of a stored scale: 16 or 32.
    scale_bits: int = 16
    # Of every random draw.
    seed: int = 0
    # Steps of a learned method, each block.
    iterations: int = 200

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise QvlaError(f"the baseline must be one of {sorted(METHODS)}, got {self.method!r}")
        known = METHODS[self.method]
        if self.bits not in known.bits:
            raise QvlaError(f"{self.method} is run at {list(known.bits)} bits, got {self.bits}")
        if self.activation_bits not in known.activation_bits:
            shown = [b if b is not None else "float" for b in known.activation_bits]
            got = self.activation_bits if self.activation_bits is not None else "float"
            raise QvlaError(
                f"inputs of layers under {self.method} are {shown}, got {got}; "
                "see --activation-bits"
            )
        if self.scale_bits not in (16, 32) or (self.group_size or 1) < 1 or self.iterations < 1:
            raise QvlaError(
                "scales have 16 or 32 bits, groups and iterations are at least 1, got "
                f"{self.scale_bits}, {self.group_size} and {self.iterations}"
            )

    @property
    def setting(self) -> str:
        """Name of the setting in a run folder: w4-awq, w8a8-smoothquant."""
        activations = "" if self.activation_bits is None else f"a{self.activation_bits}"
        return f"w{self.bits}{activations}-{self.method}"
