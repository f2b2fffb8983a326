"""Four packed bytes at once, in PTX: codes of 2, 4 and 8 bits as int8 numbers or float16 halves.

Triton takes a tensor's elements one by one; so unpacked, a code costs eleven instructions, and the
tensor cores wait. Four bytes of a channel lie in one register: here a code costs one (int8) or two
(float16). No carry leaves a byte: a code less its lowest, u, times its factor, m, plus 128 minus
the lowest's distance from 0 times m is between 0 and 255 wherever the product is an int8 number.
Triton's interpreter runs no PTX; there the same numbers come from `mixed_width`'s plain form, and
tests/engines/kernels evaluates these texts for every byte and whole factor. PTX ISA 8.5.
"""

# Repeats a byte in four.
_ONES = 0x01010101
# Immediate of lop3 for (a & b) ^ c.
_AND_XOR = (0xF0 & 0xCC) ^ 0xAA


def integers_text(bits: int, part: int) -> str:
    """Return PTX for four codes times a factor, as int8 numbers.

    Operands: $0 the numbers, $1 four bytes, $2 to $5 the factor, 1 to 128 / 2^(bits - 1).

    Args:
        bits: 2 or 4.
        part: which code of each byte, lowest bits first.
    """
    middle = 1 << (bits - 1)
    return (
        "{ .reg .b32 t, c; "
        f"{_codes_text('$1', bits, part)} "
        f"mul.lo.u32 c, $2, {middle * _ONES:#x}; "
        f"sub.u32 c, {0x80 * _ONES:#x}, c; "
        "mad.lo.u32 t, t, $2, c; "
        f"xor.b32 $0, t, {0x80 * _ONES:#x}; }}"
    )


def halves_text(bits: int, part: int) -> str:
    """Return PTX for four codes times a factor, as float16 halves.

    Operands: $0 and $1 the halves, $2 four bytes, $3 and $4 twice the factor in halves each. A
    code less its lowest is put behind 1024, whose last bit counts 1, and 1024 taken away again.

    Args:
        bits: 2, 4 or 8.
        part: as of `integers_text`.
    """
    tall = 0x6400 + (1 << (bits - 1))
    return (
        "{ .reg .b32 t, k, c; "
        f"{_codes_text('$2', bits, part)} "
        f"mov.b32 k, {0x64 * _ONES:#x}; mov.b32 c, {tall * 0x10001:#x}; "
        "prmt.b32 $0, t, k, 0x4140; prmt.b32 $1, t, k, 0x4342; "
        "sub.f16x2 $0, $0, c; sub.f16x2 $1, $1, c; "
        "mul.f16x2 $0, $0, $3; mul.f16x2 $1, $1, $4; }"
    )


def _codes_text(source: str, bits: int, part: int) -> str:
    """Return PTX that puts codes less their lowest, one a byte, into t."""
    mask, middle = ((1 << bits) - 1) * _ONES, (1 << (bits - 1)) * _ONES
    return f"shr.u32 t, {source}, {bits * part}; lop3.b32 t, t, {mask:#x}, {middle:#x}, {_AND_XOR};"


# Of each width and part.
INTEGERS = {bits: [integers_text(bits, part) for part in range(8 // bits)] for bits in (2, 4)}
HALVES = {bits: [halves_text(bits, part) for part in range(8 // bits)] for bits in (2, 4, 8)}
