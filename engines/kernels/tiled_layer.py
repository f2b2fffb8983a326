"""A layer's tiles on a device, and the launch that multiplies rows with them."""

from typing import Any

import numpy as np
import torch
import triton

from engines.base import EngineError
from engines.kernels.launch_form import ProductForm, launch_form
from engines.kernels.launches import launching
from engines.kernels.mixed_width import (
    OutputPointers,
    Product,
    ProductSizes,
    RowPointers,
    TilePointers,
    multiply_tiles,
)
from engines.kernels.tile_layout import BITS, TILE, TileLayout

_HALVES = (torch.float16, torch.bfloat16)


class TiledLayer:
    """One layer whose channels have widths of their own; a launch for each call."""

    def __init__(self, layout: TileLayout, device: torch.device) -> None:
        """Copy a layout to a device.

        Args:
            layout: halves of its tiles of 16 bits are float16 for whole-number rows, and of the
                rows' type otherwise; see `lay_out`.
            device: a GPU; or the CPU, where Triton's interpreter runs.
        """
        self.inputs, self.channels = layout.inputs, layout.channels
        self.nbytes = layout.nbytes
        # Width of each tile; 0 where its channels are pruned.
        self.tile_bits: tuple[int, ...] = tuple(layout.table[:, BITS].tolist())
        self._tiles, self._factor_bytes = layout.tiles, layout.factor_bytes
        arrays = (layout.codes, layout.table, layout.factors, layout.scales, layout.biases)
        filled = [np.pad(array.ravel(), (0, int(array.size == 0))) for array in arrays]
        copies = [torch.from_numpy(array).to(device) for array in (*filled, layout.places)]
        self._pointers = TilePointers(*copies)
        # Sums of parts and their arrivals, by shape: a captured graph keeps using them.
        self._sums: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(
        self,
        rows: torch.Tensor,
        scale: torch.Tensor | None = None,
        dtype: torch.dtype = torch.float16,
        form: ProductForm | None = None,
    ) -> torch.Tensor:
        """Return rows times weights, with the bias.  [rows, channels]

        Args:
            rows: int8, float16 or bfloat16 [rows, inputs], without gaps.
            scale: of int8 rows, float32 [1].
            dtype: of what is returned.
            form: how the product is split; None for that of `launch_form`.

        Raises:
            EngineError: rows of another shape or type, or int8 rows without a scale; or Triton
                cannot compile for this GPU, or it lacks the shared memory.
        """
        self._require_rows(rows, scale)
        count, integers = len(rows), rows.dtype == torch.int8
        if form is None:
            form = launch_form(count, self._tiles, self._factor_bytes, self.inputs, integers)
        out = torch.empty((count, self.channels), dtype=dtype, device=rows.device)
        blocks = triton.cdiv(count, form.block_rows)
        sums, arrivals = self._parts(form.parts, count, blocks, rows)
        product = Product(
            RowPointers(rows, self._pointers.scales if scale is None else scale),
            self._pointers,
            OutputPointers(out, sums, arrivals),
            ProductSizes(count, self.inputs, self.channels),
        )
        grid = (blocks, self._tiles, form.parts)
        options = {"num_warps": form.warps, "num_stages": form.stages, "enable_fp_fusion": True}
        with launching(rows.device):
            multiply_tiles[grid](product, form, **options)
        return out

    def _parts(
        self, parts: int, count: int, blocks: int, rows: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return where parts leave their sums, and the zeros where they count arrivals."""
        kind = torch.int32 if rows.dtype == torch.int8 else torch.float32
        key = (parts, count, kind)
        if key not in self._sums:
            slots = parts * count * self._tiles * TILE if parts > 1 else 1
            arrivals = torch.zeros(blocks * self._tiles, dtype=torch.int32, device=rows.device)
            self._sums[key] = torch.empty(slots, dtype=kind, device=rows.device), arrivals
        return self._sums[key]

    def _require_rows(self, rows: torch.Tensor, scale: torch.Tensor | None) -> None:
        if rows.dim() != 2 or rows.shape[1] != self.inputs or not rows.is_contiguous():
            raise EngineError(
                f"rows must be [rows, {self.inputs}] without gaps, got {list(rows.shape)}"
            )
        if rows.dtype not in (torch.int8, *_HALVES):
            raise EngineError(f"rows must be int8, float16 or bfloat16, got {rows.dtype}")
        if len(rows) * self.inputs >= 1 << 31:
            raise EngineError(f"rows times inputs must be below 2^31, got {len(rows)} rows")
        if rows.dtype == torch.int8 and self._factor_bytes == 2:
            raise EngineError(
                "int8 rows take factors that are whole numbers; export with --scales two-level"
            )
        if (rows.dtype == torch.int8) != (scale is not None):
            raise EngineError(f"int8 rows have a scale, others have none, got {rows.dtype} rows")
