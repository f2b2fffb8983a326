"""Rows rounded to int8 numbers, with the norm before them, in one pass over memory; in Triton.

One program takes one row: it is read once, and its codes are written. Operators one after another
pass over float32 rows for every step of a norm and of a rounding.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from engines.kernels.rounding_form import LAYER_NORM, NO_NORM

_NO_NORM, _LAYER_NORM = tl.constexpr(NO_NORM), tl.constexpr(LAYER_NORM)
# In float32 numbers of this size have no fraction: adding it rounds to whole ones, halves to even.
_NO_FRACTION = tl.constexpr(1.5 * 2**23)


class Rounding(NamedTuple):
    """Everything of one launch but its form."""

    # float16, bfloat16 or float32 [rows, inputs]
    rows: Any
    # int8 [rows, inputs]
    codes: Any
    # Of the norm, float32 [inputs] each.
    weights: Any
    biases: Any
    # Step of the codes, float32 [1].
    step: Any
    inputs: Any
    # Of the norm.
    epsilon: Any


@triton.jit
def round_rows(task, FORM: tl.constexpr):
    """Round one row; grid [rows]."""
    column = tl.arange(0, FORM.block)
    inside = column < task.inputs
    place = tl.program_id(0).to(tl.int64) * task.inputs + column
    values = tl.load(task.rows + place, mask=inside, other=0).to(tl.float32)
    if FORM.norm != _NO_NORM:
        values = _normal(values, column, task, FORM)
    quotients = tl.div_rn(values, tl.load(task.step))
    near = tl.minimum(tl.maximum(quotients, -128.0), 127.0)
    codes = (near + _NO_FRACTION) - _NO_FRACTION
    tl.store(task.codes + place, codes.to(tl.int8), mask=inside)


@triton.jit
def _normal(values, column, task, FORM: tl.constexpr):
    """Return a row after its norm.  float32 [block]"""
    inside = column < task.inputs
    if FORM.norm == _LAYER_NORM:
        mean = tl.sum(values, axis=0) / task.inputs
        values = tl.where(inside, values - mean, 0.0)
    power = tl.sum(values * values, axis=0) / task.inputs
    values = values * tl.div_rn(1.0, tl.sqrt_rn(power + task.epsilon))
    values *= tl.load(task.weights + column, mask=inside, other=0)
    if FORM.norm == _LAYER_NORM:
        values += tl.load(task.biases + column, mask=inside, other=0)
    if FORM.halves:
        values = values.to(tl.float16).to(tl.float32)
    return values
