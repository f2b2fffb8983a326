"""What Triton's compiler and ptxas report of the kernel, for GPUs that are not here."""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.base import EngineError
from engines.kernels.launch_form import ProductForm, launch_form
from engines.kernels.tile_layout import STEP_BYTES, TILE

if TYPE_CHECKING:
    from engines.kernels.mixed_width import Product

TABLE_HEAD = (
    "| GPU | rows, of a block | factors | registers | shared KiB | spills "
    "| 2 bits | 4 bits | 8 bits | 16 bits | bytes a weight |"
)
# Compute capabilities: Orin, RTX 4070 and 4090, H100.
ARCHITECTURES = (87, 89, 90)
# Multiplications of one instruction: of a warp (int8, float16); of sm_90's, of four warps.
_WARP_PRODUCTS = {"IMMA.16832": 16 * 8 * 32, "HMMA.16816": 16 * 8 * 16}
_GROUP_PRODUCT = re.compile(r"[HI]GMMA\.(\d+)x(\d+)x(\d+)")
# cp.async of 16 bytes a thread, and of 4.
_COPIES = {"LDGSTS.E.BYPASS.128": 16, "LDGSTS.E.64": 8, "LDGSTS.E": 4}
_THREADS_OF_A_WARP = 32


@dataclass(frozen=True)
class WidthLoop:
    """The loop over a tile's inputs at one width."""

    bits: int
    # Of one step.
    inputs: int
    # Of one warp and step; and those of tensor cores among them, by name.
    instructions: int
    multiplying: int
    multiplies_with: str
    # Copied to shared memory by a program a step, rows and weights, factors included.
    loaded_bytes: int
    weight_bytes: float


@dataclass(frozen=True)
class CompiledKernel:
    """One form of the kernel for one architecture."""

    architecture: int
    form: ProductForm
    registers: int
    shared_bytes: int
    # Loads and stores of registers that did not suffice.
    spills: int
    loops: tuple[WidthLoop, ...]

    def row(self) -> str:
        """Return a line of a table in Markdown."""
        form = self.form
        rows = "int8" if form.integers else "float16"
        factors = "whole" if form.factor_bytes == 1 else "halves"
        cells = [
            f"sm_{self.architecture}",
            f"{rows}, {form.block_rows}",
            factors,
            str(self.registers),
            f"{self.shared_bytes / 1024:.1f}",
            str(self.spills),
            *(f"{loop.multiplying}/{loop.instructions}" for loop in self.loops),
            " / ".join(f"{loop.weight_bytes:.2f}" for loop in self.loops),
        ]
        return f"| {' | '.join(cells)} |"

    def loop(self, bits: int) -> WidthLoop:
        """Return the loop of a width."""
        (found,) = (loop for loop in self.loops if loop.bits == bits)
        return found


def chosen_forms(inputs: int = 4096) -> tuple[ProductForm, ...]:
    """Return the forms that layers of a language model run in: few rows and many.

    Rows are int8 or float16; factors whole numbers, or halves for float16 rows.

    Args:
        inputs: of the layers; steps are whole where 256 divides them.
    """
    kinds = ((1, True), (1, False), (2, False))
    return tuple(
        launch_form(rows, 64, factor_bytes, inputs, integers)
        for factor_bytes, integers in kinds
        for rows in (1, 300)
    )


def compile_kernel(form: ProductForm, architecture: int) -> CompiledKernel:
    """Compile a form for an architecture; seconds, no GPU.

    Raises:
        EngineError: Triton is not installed.
    """
    _require_triton()
    from engines.kernels.mixed_width import multiply_tiles

    options = {"num_warps": form.warps, "num_stages": form.stages, "enable_fp_fusion": True}
    taken = {"product": _signature(form)}
    kernel = _compiled(multiply_tiles, taken, _aligned(form), form, architecture, options)
    registers, instructions = _reported(kernel)
    return CompiledKernel(
        architecture,
        form,
        registers,
        int(kernel.metadata.shared),
        _spills(instructions),
        _loops(instructions, form),
    )


@dataclass(frozen=True)
class CompiledRounding:
    """What rounds rows of some inputs and type, for one architecture."""

    architecture: int
    inputs: int
    # Of Triton's: "fp32", "fp16".
    rows: str
    norm: str
    registers: int
    shared_bytes: int
    spills: int

    def row(self) -> str:
        """Return a line of a table in Markdown."""
        what = f"{self.norm}, {self.inputs} of {self.rows}"
        return f"| sm_{self.architecture} | {what} | {self.registers} | {self.spills} |"


def compile_rounding(norm: str, inputs: int, rows: str, architecture: int) -> CompiledRounding:
    """Compile what rounds rows, after a norm whose result is rounded to float16, or "none".

    Raises:
        EngineError: Triton is not installed.
    """
    _require_triton()
    from engines.kernels.rounded_rows import Rounding, round_rows
    from engines.kernels.rounding_form import rounding_form

    form, warps = rounding_form(inputs, norm, halves=norm != "none")
    wide = ("*fp32",) * 3
    taken = {"task": Rounding(f"*{rows}", "*i8", *wide, "i32", "fp32")}
    options = {"num_warps": warps, "enable_fp_fusion": False}
    aligned = [(0, place) for place in range(6)]
    kernel = _compiled(round_rows, taken, aligned, form, architecture, options)
    registers, instructions = _reported(kernel)
    shared, spills = int(kernel.metadata.shared), _spills(instructions)
    return CompiledRounding(architecture, inputs, rows, norm, registers, shared, spills)


def _require_triton() -> None:
    """Raise EngineError where Triton is not installed."""
    if find_spec("triton") is None:
        raise EngineError("compiling needs Triton; pip install 'qvla[triton]'")


def _compiled(
    function: Any,
    taken: dict[str, Any],
    aligned: Sequence[tuple[int, ...]],
    form: Any,
    architecture: int,
    options: dict[str, Any],
) -> Any:
    """Return a kernel for an architecture: of a form, taking what has these types.

    Args:
        aligned: where in that are multiples of 16: indices of arguments and of their fields.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    multiples = {path: [["tt.divisibility", 16]] for path in aligned}
    source = ASTSource(function, {**taken, "FORM": "constexpr"}, {"FORM": form}, multiples)
    target = GPUTarget("cuda", architecture, _THREADS_OF_A_WARP)
    return triton.compile(source, target, options)


def _reported(kernel: Any) -> tuple[int, list[tuple[int, str, str]]]:
    """Return a compiled kernel's registers and instructions, as cuobjdump reports them."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _output(tools / "cuobjdump", "-res-usage", cubin)
        code = _output(tools / "cuobjdump", "-sass", cubin)
    found = re.search(r"REG:(\d+)", usage)
    if found is None:
        raise EngineError(f"cuobjdump says no registers: {usage:.200}")
    return int(found[1]), _instructions(code)


def _spills(instructions: Sequence[tuple[int, str, str]]) -> int:
    """Return the loads and stores of registers that did not suffice."""
    return sum(name.startswith(("STL", "LDL")) for _, name, _ in instructions)


def _signature(form: ProductForm) -> "Product":
    from engines.kernels.mixed_width import (
        OutputPointers,
        Product,
        ProductSizes,
        RowPointers,
        TilePointers,
    )

    rows, sums = ("*i8", "*i32") if form.integers else ("*fp16", "*fp32")
    return Product(
        RowPointers(rows, "*fp32"),
        TilePointers("*u8", "*i32", "*u8", "*fp32", "*fp32", "*i32"),
        OutputPointers("*fp16", sums, "*i32"),
        ProductSizes("i32", "i32", "i32"),
    )


def _aligned(form: ProductForm) -> list[tuple[int, ...]]:
    """Return which arguments are multiples of 16: torch's memory, and whole steps of inputs."""
    counts = enumerate((2, 6, 3))
    pointers: list[tuple[int, ...]] = [(0, n, place) for n, k in counts for place in range(k)]
    return [*pointers, (0, 3, 1)] if form.whole_steps else pointers


def _output(*command: Any) -> str:
    run = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if run.returncode:
        raise EngineError(f"{command[0]} failed: {run.stderr[-500:]}")
    return run.stdout


def _instructions(code: str) -> list[tuple[int, str, str]]:
    """Return address, name and operands of every instruction of a disassembly."""
    pattern = r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.x]+)([^;]*);"
    return [
        (int(place, 16), name, rest)
        for place, name, rest in re.findall(pattern, code, re.MULTILINE)
    ]


def _loops(
    instructions: Sequence[tuple[int, str, str]], form: ProductForm
) -> tuple[WidthLoop, ...]:
    """Return the loops that multiply; a step of fewer bits has more inputs, so more products."""
    found = []
    for place, name, rest in instructions:
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target is not None and int(target[1], 16) < place:
            start = int(target[1], 16)
            body = [name for at, name, _ in instructions if start <= at <= place]
            multiplying = [name for name in body if _products(name, form.warps)]
            if multiplying:
                found.append((body, multiplying))
    loops = []
    for body, multiplying in found:
        products = sum(_products(name, form.warps) for name in multiplying)
        inputs = products // (form.block_rows * TILE)
        bits = STEP_BYTES * 8 // inputs
        threads = form.warps * _THREADS_OF_A_WARP
        names = Counter(body)
        loaded = threads * sum(names[name] * size for name, size in _COPIES.items())
        rows = form.block_rows * inputs * (1 if form.integers else 2)
        loops.append(
            WidthLoop(
                bits,
                inputs,
                len(body),
                len(multiplying),
                multiplying[0],
                loaded,
                (loaded - rows) / (TILE * inputs),
            )
        )
    return tuple(sorted(loops, key=lambda loop: loop.bits))


def _products(name: str, warps: int) -> int:
    """Return the multiplications of a program's warps by one instruction; 0 of another kind."""
    group = _GROUP_PRODUCT.match(name)
    if group is not None:
        height, width, depth = map(int, group.groups())
        return height * width * depth * warps // 4
    return warps * _WARP_PRODUCTS.get(".".join(name.split(".")[:2]), 0)
