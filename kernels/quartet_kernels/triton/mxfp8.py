"""MXFP8 operands of `backward_dtype="mxfp8"`: E4M3 relative to a power of two per 32 elements, along rows or columns.

    scale = 2^(floor(log2 max|v|) - 7), code = v / scale rounded to nearest even: below 256, so nothing saturates

No rotation and no random numbers. Where there are no MXFP8 units the operand is code * scale in bfloat16, exactly.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    FIRST_NOT_FINITE,
    INTERPRET,
    empty_tiled,
    largest_bits,
    per_element,
    power_of_two,
    tiled_scale_at,
    tiles_scales,
    to_bfloat16,
    to_float32,
)
from .launch import cdiv, launch
from .matmul import decode_tile

Operand = tuple[Tensor, Tensor]

ROWS, COLUMNS, WARPS = 128, 256 if INTERPRET.value else 64, 4
"""A tile, and its warps: 64 elements a thread."""

MIN_EXPONENT = tl.constexpr(-117)
MAX_EXPONENT = tl.constexpr(119)


@triton.jit(do_not_specialize=["n_rows"])
def mxfp8_kernel(
    x_ptr, in_scales_ptr, data_ptr, scales_ptr, n_rows, n_columns, row_stride,
    TRANSPOSE: tl.constexpr, TILED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of x [n_rows, n_columns], or (in_scales_ptr) of packed codes, to data [operand's groups, 32]: E4M3 beside
    scales [groups] (TILED as for a GEMM of capability 10.x), or bfloat16 where `scales_ptr` is None."""
    R: tl.constexpr = ROWS * COLUMNS // 32
    tiles = tl.cdiv(n_columns, COLUMNS)
    first_row = tl.program_id(0) // tiles * ROWS
    first_column = tl.program_id(0) % tiles * COLUMNS
    row = (first_row + tl.arange(0, ROWS)).to(tl.int64)
    if in_scales_ptr is not None:
        even, odd = decode_tile(
            x_ptr, in_scales_ptr, row, row < n_rows, first_column, n_columns, ROWS, COLUMNS, tl.float32
        )
        x = tl.interleave(even, odd)
    else:
        column = first_column + tl.arange(0, COLUMNS)
        x_at = row[:, None] * row_stride + column[None, :]
        x = to_float32(tl.load(x_ptr + x_at, mask=(row < n_rows)[:, None] & (column < n_columns)[None, :], other=0.0))
    local = tl.arange(0, R)
    if TRANSPOSE:
        x = tl.trans(x)
        out_row = first_column + local // (ROWS // 32)
        group = first_row // 32 + local % (ROWS // 32)
        out_rows, per_row = n_columns, tl.cdiv(n_rows, 32)
    else:
        out_row = first_row + local // (COLUMNS // 32)
        group = first_column // 32 + local % (COLUMNS // 32)
        out_rows, per_row = n_rows, n_columns // 32
    groups = out_row.to(tl.int64) * per_row + group
    inside = (out_row < out_rows) & (group < per_row)

    v = x.reshape(R, 4, 8)
    largest = largest_bits(v)
    finite = largest < FIRST_NOT_FINITE
    exponent = tl.minimum(tl.maximum((largest >> 23) - 134, MIN_EXPONENT), MAX_EXPONENT)
    u = v * per_element(power_of_two(-exponent))
    u = tl.minimum(tl.maximum(u, -448.0), 448.0)
    # 1.5 * 2^20 times the binade: the sum's last bit is a step of the grid, which below 2^-6 is that of the subnormals.
    binade = (u.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    shift = tl.maximum(binade, 0.015625) * 1572864.0
    values = (u + shift) - shift
    data_at = (groups * 32)[:, None, None] + (tl.arange(0, 4)[:, None] * 8 + tl.arange(0, 8)[None, :])[None, :, :]
    if scales_ptr is not None:
        data = tl.where(per_element(finite), values, 0.0).to(tl.float8e4nv)
        byte = tl.where(finite, tl.where(largest == 0, 0, exponent + 127), 255)
        scale_at = tiled_scale_at(out_row, group, per_row) if TILED else groups
        tl.store(scales_ptr + scale_at, byte.to(tl.uint8), mask=inside)
    else:
        scale = tl.where(finite, power_of_two(exponent), float("nan"))
        data = to_bfloat16(values * per_element(scale))
    tl.store(data_ptr + data_at, data, mask=inside[:, None, None])


def quantize_mxfp8(x: Tensor, scales: Tensor | None = None, *, transpose: bool, native: bool) -> Operand:
    """See `quartet_kernels.reference.quantize_mxfp8`.

    Args:
        x: float32, bfloat16 or float16 [M, N]; or codes uint8 [M, N/2] of a packed tensor, read as code * scale.
        scales: uint8 [M, N/32] of packed codes.
        transpose: Group along M, padded with zeros to a multiple of 32: the operand is [N, M]. Else N is a multiple.
        native: float8_e4m3fn and scales uint8 [rows, columns / 32], tiled on GPUs that want it so; else bfloat16 and an
            empty tensor.
    """
    rows, columns = x.shape[0], x.shape[1] * (1 if scales is None else 2)
    x = x.contiguous() if scales is not None or x.stride(1) != 1 else x
    shape = (columns, cdiv(rows, 32) * 32) if transpose else (rows, columns)
    data = torch.empty(shape, dtype=torch.float8_e4m3fn if native else torch.bfloat16, device=x.device)
    tiled = native and tiles_scales(x.device)
    if tiled:
        out_scales = empty_tiled(shape[0], shape[1] // 32, x.device)
    elif native:
        out_scales = torch.empty(shape[0], shape[1] // 32, dtype=torch.uint8, device=x.device)
    else:
        out_scales = torch.empty(0, dtype=torch.float32, device=x.device)
    if data.numel() > 0:
        pointers = (x, None if scales is None else scales.contiguous(), data, out_scales if native else None)
        arguments = (*pointers, rows, columns, x.stride(0))
        programs = cdiv(rows, ROWS) * cdiv(columns, COLUMNS)
        launch(mxfp8_kernel, x.device, programs, arguments, (transpose, tiled, ROWS, COLUMNS), WARPS)
    return data, out_scales
