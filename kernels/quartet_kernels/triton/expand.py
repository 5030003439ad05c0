"""Packed MXFP4 to an FP8 operand: E5M2 relative to one power of two a row, exact over 28 binades.

E = the largest exponent of the row's groups with a non-zero code, at least -113
data = code * 2^(e - E + 13) in E5M2 (exponents -15..13), row scale = 2^(E - 13)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import INTERPRET

ROWS = 16 if INTERPRET.value else 1
GROUPS = 64 if INTERPRET.value else 128
SCALES = 256
NOT_FINITE = tl.constexpr(1000)


@triton.jit
def fp8_byte(x):
    """E5M2 byte of float32 numbers, to nearest even, as uint32."""
    if INTERPRET:  # casts to FP8 wrongly; E5M2 is the upper byte of float16
        half = x.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
        byte = (half + 0x7F + ((half >> 8) & 1)) >> 8
    else:
        byte = x.to(tl.float8e5).to(tl.uint8, bitcast=True).to(tl.uint32)
    return byte


@triton.jit
def permute_bytes(low, high, selectors):
    """PTX's prmt: byte i of the result is byte number (hexadecimal digit i of the selector, 0..7) of high:low."""
    if INTERPRET:
        out = low * 0
        for i in tl.static_range(4):
            index = (selectors >> (4 * i)) & 7
            shift = (index & 3) * 8
            out |= (tl.where(index < 4, low >> shift, high >> shift) & 0xFF) << (8 * i)
    else:
        out = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [low, high, selectors], dtype=tl.uint32, is_pure=True, pack=1
        )
    return out


@triton.jit
def look_up(low, high, codes, words, SIGN_BYTES: tl.constexpr):
    """Four FP8 bytes for the lowest four codes: the table high:low at their indices, signs out of all eight codes."""
    magnitudes = permute_bytes(low, high, codes & 0x7777)
    # Odd codes have their signs on top of a byte; a shift by 4 brings those of the even ones there.
    signs = permute_bytes(words << 4, words, words * 0 + SIGN_BYTES)
    return magnitudes | (signs & 0x80808080)


@triton.jit(do_not_specialize=["n_rows", "n_groups"])
def expand_kernel(
    codes_ptr, scales_ptr, data_ptr, row_scale_ptr, n_rows, n_groups,
    CHECK_CODES: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, SCALES: tl.constexpr,
):  # fmt: skip
    """ROWS x GROUPS groups of codes int32 [n_rows, n_groups, 4], scales uint8 [n_rows, n_groups] to data int32
    [n_rows, n_groups, 8], four FP8 numbers a word."""
    tiles = tl.cdiv(n_groups, GROUPS)
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(0) % tiles
    row_inside = (row < n_rows)[:, None]
    first = row.to(tl.int64)[:, None] * n_groups

    group = tile * GROUPS + tl.arange(0, GROUPS)[None, :]
    inside = row_inside & (group < n_groups)
    words_at = ((first + group) * 4)[:, :, None] + tl.arange(0, 4)[None, None, :]
    words = tl.load(codes_ptr + words_at, mask=inside[:, :, None], other=0).to(tl.uint32, bitcast=True)
    byte = tl.load(scales_ptr + first + group, mask=inside, other=0).to(tl.int32)

    # The row's largest scale byte, + 1; 0 without a non-zero code; NOT_FINITE, under which all data round to zero.
    largest = tl.zeros((ROWS,), tl.int32)
    for start in range(0, n_groups, SCALES):
        other = start + tl.arange(0, SCALES)[None, :]
        other_inside = row_inside & (other < n_groups)
        scale = tl.load(scales_ptr + first + other, mask=other_inside, other=0).to(tl.int32)
        if CHECK_CODES:
            other_at = ((first + other) * 4)[:, :, None] + tl.arange(0, 4)[None, None, :]
            other_words = tl.load(codes_ptr + other_at, mask=other_inside[:, :, None], other=0)
            used = tl.max(((other_words & 0x77777777) != 0).to(tl.int32), axis=2) != 0
        else:
            used = scale != 0
        key = tl.where(scale == 255, NOT_FINITE, tl.where(used, scale + 1, 0))
        largest = tl.maximum(largest, tl.max(key, axis=1))
    top = tl.maximum(largest - 1, 127 - 113)
    row_scale = ((tl.minimum(top, 254) - 13) << 23).to(tl.float32, bitcast=True)
    row_scale = tl.where(largest == NOT_FINITE, float("nan"), tl.where(largest == 0, 1.0, row_scale))
    if tile == 0:
        tl.store(row_scale_ptr + row, row_scale, mask=row < n_rows)

    exponent = tl.maximum(byte - top[:, None] + 13, -100)  # far below the span everything rounds to zero
    factor = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    low = ((fp8_byte(0.5 * factor) << 8) | (fp8_byte(factor) << 16) | (fp8_byte(1.5 * factor) << 24))[:, :, None]
    high = fp8_byte(2.0 * factor) | (fp8_byte(3.0 * factor) << 8)
    high = (high | (fp8_byte(4.0 * factor) << 16) | (fp8_byte(6.0 * factor) << 24))[:, :, None]
    low = tl.broadcast_to(low, (ROWS, GROUPS, 4))
    high = tl.broadcast_to(high, (ROWS, GROUPS, 4))
    data = tl.join(look_up(low, high, words, words, 0x5140), look_up(low, high, words >> 16, words, 0x7362))
    data_at = (words_at * 2)[:, :, :, None] + tl.arange(0, 2)[None, None, None, :]
    tl.store(data_ptr + data_at, data.to(tl.int32, bitcast=True), mask=inside[:, :, None, None])


def expand(codes: Tensor, scales: Tensor, *, check_codes: bool = True) -> tuple[Tensor, Tensor]:
    """FP8 operand of codes uint8 [M, K/2] and scales uint8 [M, K/32]: float8_e5m2 [M, K] and float32 [M].

    Groups more than 28 binades below E round to nearest even. A row without a non-zero code has scale 1; a row with a
    byte 255 has scale NaN and data 0. ``check_codes=False`` spares looking for groups whose codes are all zero under a
    byte that is not; only right for codes of the quantisers, where such groups are all below 2^-113.
    """
    rows, groups = scales.shape
    data = torch.empty(rows, groups * 32, dtype=torch.float8_e5m2, device=codes.device)
    if groups == 0:
        return data, torch.ones(rows, dtype=torch.float32, device=codes.device)
    row_scale = torch.empty(rows, dtype=torch.float32, device=codes.device)
    if rows > 0:
        expand_kernel[(triton.cdiv(rows, ROWS) * triton.cdiv(groups, GROUPS),)](
            codes.contiguous().view(torch.int32), scales.contiguous(), data.view(torch.int32), row_scale, rows, groups,
            CHECK_CODES=check_codes, ROWS=ROWS, GROUPS=GROUPS, SCALES=SCALES, num_warps=4,
        )  # fmt: skip
    return data, row_scale
