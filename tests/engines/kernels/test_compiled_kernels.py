"""What the compilers report of the kernel is what docs/results.md says; no register spills."""

from functools import cache

import numpy as np
import pytest
import torch
from places import ROOT

pytest.importorskip("triton", reason="Triton is 286 MB: make kernels installs it and runs these")

from engines.bench.compiled_kernels import (
    ARCHITECTURES,
    TABLE_HEAD,
    CompiledKernel,
    chosen_forms,
    compile_kernel,
)
from engines.bench.kernel_rates import kernel_rates
from engines.bench.kernel_roofline import predict_pass, predict_product
from engines.kernels.launch_form import ProductForm, launch_form
from engines.targets import find_target
from qvla_export.latency_model.flow_shape import find_any_geometry
from qvla_export.latency_model.network_shape import LayerShape
from qvla_export.latency_model.roofline import LatencyModel

RESULTS = (ROOT / "docs" / "results.md").read_text()
# Rows of the page's table -> share of the channels at each width.
PREDICTED = {
    "8 bits": {8: 1.0},
    "4 bits": {4: 1.0},
    "2 bits": {2: 1.0},
    "10 % of 8, 60 % of 4, 30 % of 2 bits": {8: 0.1, 4: 0.6, 2: 0.3},
    "5 % of 8, 45 % of 4, 20 % of 2 bits, 30 % pruned": {8: 0.05, 4: 0.45, 2: 0.2, 0: 0.3},
}
INTEGERS, HALVES = "IMMA.16832.S8.S8", "HMMA.16816.F32"


@cache
def compiled(form: ProductForm, architecture: int) -> CompiledKernel:
    return compile_kernel(form, architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_page_says_what_the_compilers_report(architecture: int) -> None:
    assert TABLE_HEAD in RESULTS
    for form in chosen_forms():
        assert compiled(form, architecture).row() in RESULTS


@pytest.mark.parametrize("architecture", [87, 89])
@pytest.mark.parametrize("inputs", [4096, 4000])
def test_nothing_spills_and_tensor_cores_multiply(architecture: int, inputs: int) -> None:
    for form in chosen_forms(inputs):
        kernel = compiled(form, architecture)
        assert form.whole_steps == (inputs == 4096)
        assert kernel.spills == 0
        assert [loop.bits for loop in kernel.loops] == [2, 4, 8, 16]
        for loop in kernel.loops:
            integers = form.integers and loop.bits < 16
            assert loop.multiplies_with.startswith(INTEGERS if integers else HALVES)
            if form.whole_steps:  # else rows are not copied ahead, and not counted
                # A weight is read once: its code, and at most a byte a group of 16.
                assert loop.bits / 8 <= loop.weight_bytes <= loop.bits / 8 + 1 / 16


def test_a_pass_of_7b_on_orin_is_predicted_as_the_page_says() -> None:
    geometry, target = find_any_geometry("openvla-oft-7b"), find_target("orin-jp7")
    model = LatencyModel(geometry.network, target, target.power_mode(), kernel_rates(target))
    whole = model.predict().total_ms
    widths = {name: np.full(shape[0], 8, np.int8) for name, shape in geometry.layers.items()}
    assert f"{model.predict(widths, 'int8').total_ms / whole:.2f}" == "0.65"
    planned = frozenset(geometry.layers)
    one, many, _, floats, _, halves = (compiled(form, 87) for form in chosen_forms())
    kinds = [(k.form.integers, k.form.factor_bytes) for k in (many, floats, halves)]
    assert kinds == [(True, 1), (False, 1), (False, 2)]
    for name, shares in PREDICTED.items():
        ms = predict_pass(many, model, planned, shares)
        assert f"| {name} | {ms:.0f} ms, {ms / whole:.2f} |" in RESULTS
    words = " ".join(RESULTS.split())
    ms = predict_pass(floats, model, planned, {4: 1.0})
    assert f"4 bits are predicted at {ms:.0f} ms, {ms / whole:.2f} of float16" in words
    assert f"it, {predict_pass(halves, model, planned, {4: 1.0}):.0f} ms." in words
    row = LayerShape("row", 4096, 4096, 1)
    ms8, ms4, ms2 = (predict_product(one, model, row, {bits: 1.0}).ms for bits in (8, 4, 2))
    assert f"{ms8:.3f} ms at 8 bits, {ms4:.3f} at 4, {ms2:.3f} at 2" in words


class OrinsDriver:
    """What Triton asks of a GPU before it compiles for it."""

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 87, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


@pytest.fixture
def orin(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import driver

    monkeypatch.setattr(driver, "_active", OrinsDriver())


@pytest.mark.usefixtures("orin")
@pytest.mark.parametrize(("rows", "integers"), [(1, True), (300, True), (1, False)])
def test_triton_compiles_what_a_launch_passes(rows: int, integers: bool) -> None:
    """Its own binder sees the tuples and turns numbers into constants, as on a GPU."""
    from engines.kernels.mixed_width import (
        OutputPointers,
        Product,
        ProductSizes,
        RowPointers,
        TilePointers,
        multiply_tiles,
    )

    def some(kind: torch.dtype) -> torch.Tensor:
        return torch.empty(64, dtype=kind)

    byte, whole, wide = torch.uint8, torch.int32, torch.float32
    product = Product(
        RowPointers(some(torch.int8 if integers else torch.float16), some(wide)),
        TilePointers(*map(some, (byte, whole, byte, wide, wide, whole))),
        OutputPointers(some(torch.float16), some(whole if integers else wide), some(whole)),
        ProductSizes(rows, 4096, 512),
    )
    form = launch_form(rows, 8, 1, 4096, integers)
    options = {"num_warps": form.warps, "num_stages": form.stages, "enable_fp_fusion": True}
    kernel = multiply_tiles.warmup(product, form, grid=(1, 8, form.parts), **options)
    assert b"ELF" in kernel.asm["cubin"][:8]
