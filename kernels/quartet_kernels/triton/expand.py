"""Packed MXFP4 to an FP8 operand: E5M2 relative to one power of two a row, exact over 28 binades.

E = the largest exponent of the row's groups with a non-zero code, at least -113
data = code * 2^(e - E + 13) in E5M2 (exponents -15..13), row scale = 2^(E - 13)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import INTERPRET, fp8_words, group_factor, row_key, row_scale_of, row_top
from .launch import cdiv, launch, next_power_of_2

PAIRS = 2048 if INTERPRET.value else 1024  # of code words in a tile: 512 groups
WARPS = 8


@triton.jit(do_not_specialize=["n_rows", "n_groups"])
def expand_kernel(
    codes_ptr, scales_ptr, data_ptr, row_scale_ptr, n_rows, n_groups,
    CHECK_CODES: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """ROWS x PAIRS pairs of code words int32 [n_rows, n_groups, 2, 2], scales uint8 [n_rows, n_groups] to data int32
    [n_rows, n_groups, 2, 4], four FP8 numbers a word: a thread reads 8 bytes and writes 16, without gaps."""
    GROUPS: tl.constexpr = PAIRS // 2
    tiles = tl.cdiv(n_groups, GROUPS)
    row = tl.program_id(0) // tiles * ROWS + tl.arange(0, ROWS)
    tile = tl.program_id(0) % tiles
    row_inside = (row < n_rows)[:, None]
    first = row.to(tl.int64)[:, None] * n_groups

    pair = tile * PAIRS + tl.arange(0, PAIRS)[None, :]
    inside = row_inside & (pair < n_groups * 2)
    pairs_at = first * 2 + pair
    words_at = (pairs_at * 2)[:, :, None] + tl.arange(0, 2)[None, None, :]
    words = tl.load(codes_ptr + words_at, mask=inside[:, :, None], other=0).to(tl.uint32, bitcast=True)
    byte = tl.load(scales_ptr + first + pair // 2, mask=inside, other=0).to(tl.int32)

    largest = tl.zeros((ROWS,), tl.int32)
    for start in range(0, n_groups, GROUPS):
        other = start + tl.arange(0, GROUPS)[None, :]
        other_inside = row_inside & (other < n_groups)
        scale = tl.load(scales_ptr + first + other, mask=other_inside, other=0).to(tl.int32)
        if CHECK_CODES:
            other_at = ((first + other) * 4)[:, :, None] + tl.arange(0, 4)[None, None, :]
            other_words = tl.load(codes_ptr + other_at, mask=other_inside[:, :, None], other=0)
            used = tl.max(((other_words & 0x77777777) != 0).to(tl.int32), axis=2) != 0
        else:
            used = scale != 0
        largest = tl.maximum(largest, tl.max(row_key(scale, used), axis=1))
    if tile == 0:
        tl.store(row_scale_ptr + row, row_scale_of(largest), mask=row < n_rows)

    factor = group_factor(byte, row_top(largest)[:, None])
    data = fp8_words(words, factor[:, :, None]).reshape(ROWS, PAIRS, 4)
    data_at = (pairs_at * 4)[:, :, None] + tl.arange(0, 4)[None, None, :]
    tl.store(data_ptr + data_at, data.to(tl.int32, bitcast=True), mask=inside[:, :, None])


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
        # Three shapes of tile serve all: of short rows, two or four.
        pairs = min(PAIRS, max(PAIRS // 4, next_power_of_2(2 * groups)))
        tile_rows = PAIRS // pairs
        pointers = (codes.contiguous().view(torch.int32), scales.contiguous(), data.view(torch.int32), row_scale)
        programs = cdiv(rows, tile_rows) * cdiv(groups, pairs // 2)
        constants = (check_codes, tile_rows, pairs)
        launch(expand_kernel, codes.device, programs, (*pointers, rows, groups), constants, WARPS)
    return data, row_scale
