"""GEMM over packed MXFP4 operands on FP4 tensor cores, by `tl.dot_scaled`; over MXFP8 operands, too.

Blackwell: `tcgen05.mma kind::mxf4` and `mma.sync kind::mxf4nvf4`; MI350: `v_mfma_scale_f32_32x32x64_f8f6f4`. The same
product, operands and epilogue as `matmul`. Elsewhere Triton decomposes it to bf16: the same numbers, no gain.
MXFP8: `kind::mxf8f6f4` on Blackwell, the same instruction on MI350.
"""

import torch
import triton
import triton.language as tl

from .launch import cdiv, launch
from .matmul import GROUP_M, empty_product, epilogue_arguments, finish, tile_of

BLOCK_M, BLOCK_N, BLOCK_K, WARPS = 128, 128, 128, 8
"""One tile for all. What gives FP4 instructions: on 10.x a BLOCK_M that is a multiple of 128, and 4 or 8 warps;
everywhere BLOCK_K of 64 or more. 12.x spills with fewer warps or wider tiles; 10.x has room for two programs."""


@triton.jit
def load_operand(codes_ptr, scales_ptr, rows, rows_in, k_start, K, BLOCK_K: tl.constexpr, PER_BYTE: tl.constexpr):
    """Codes [ROWS, BLOCK_K / PER_BYTE] and scales [ROWS, BLOCK_K / 32]; outside, code 0 at scale 1 (byte 255 would be
    NaN)."""
    column = k_start // PER_BYTE + tl.arange(0, BLOCK_K // PER_BYTE)
    groups = k_start // 32 + tl.arange(0, BLOCK_K // 32)
    codes_in = rows_in[:, None] & (column < K // PER_BYTE)[None, :]
    scales_in = rows_in[:, None] & (groups < K // 32)[None, :]
    codes = tl.load(codes_ptr + rows[:, None] * (K // PER_BYTE) + column[None, :], mask=codes_in, other=0)
    scales = tl.load(scales_ptr + rows[:, None] * (K // 32) + groups[None, :], mask=scales_in, other=127)
    return codes, scales


@triton.jit(do_not_specialize=["M"])
def native_matmul_kernel(
    a_ptr, a_scales_ptr, b_ptr, b_scales_ptr, c_ptr, bias_ptr, mask_ptr, rotation_ptr, alpha, rotation_scale, M, N, K,
    BIAS: tl.constexpr, MASK: tl.constexpr, G: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    FORMAT: tl.constexpr = "e2m1",
):  # fmt: skip
    """A u8 [M, K/2], B u8 [N, K/2], or [M, K] and [N, K] of FORMAT "e4m3"; scales u8 [M, K/32], [N, K/32]; C [M, N].
    One tile a program."""
    PER_BYTE: tl.constexpr = 2 if FORMAT == "e2m1" else 1
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    rows_in = rows < M
    cols_in = cols < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    tl.assume(tl.cdiv(K, BLOCK_K) > 0)
    for k in range(0, tl.cdiv(K, BLOCK_K)):
        a, a_scales = load_operand(a_ptr, a_scales_ptr, rows, rows_in, k * BLOCK_K, K, BLOCK_K, PER_BYTE)
        b, b_scales = load_operand(b_ptr, b_scales_ptr, cols, cols_in, k * BLOCK_K, K, BLOCK_K, PER_BYTE)
        acc = tl.dot_scaled(a, a_scales, FORMAT, b.T, b_scales, FORMAT, acc)
    v = finish(
        acc * alpha, rows, rows_in, tile_n * BLOCK_N, N, bias_ptr, mask_ptr, rotation_ptr, rotation_scale,
        BIAS, MASK, G, PIECES,
    )  # fmt: skip
    inside = rows_in[:, None] & cols_in[None, :]
    tl.store(c_ptr + rows[:, None] * N + cols[None, :], v.to(c_ptr.dtype.element_ty), mask=inside)


def matmul(
    a: torch.Tensor, a_scales: torch.Tensor, b: torch.Tensor, b_scales: torch.Tensor, *, alpha: float,
    bias: torch.Tensor | None = None, mask: torch.Tensor | None = None, matrix: torch.Tensor | None = None,
    out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """alpha * A @ B.T (+ bias) of packed operands, with the backward's epilogue; arguments as of `matmul.matmul`.

    Or of MXFP8 operands, float8_e4m3fn [M, K] and [N, K] with scales as of packed ones.
    """
    packed = a.dtype == torch.uint8
    M, N, K = a.shape[0], b.shape[0], a.shape[1] * (2 if packed else 1)
    if M == 0 or N == 0 or K == 0:
        return empty_product(M, N, bias, mask, matrix, out_dtype, a.device)
    out = torch.empty((M, N), dtype=out_dtype, device=a.device)
    runtime, constants = epilogue_arguments(alpha, bias, mask, matrix, out, out_dtype)
    bytes_a, bytes_b = a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    arguments = (bytes_a, a_scales.contiguous(), bytes_b, b_scales.contiguous(), out, *runtime, M, N, K)
    blocks = (BLOCK_M, BLOCK_N, BLOCK_K, GROUP_M, "e2m1" if packed else "e4m3")
    programs = cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N)
    launch(native_matmul_kernel, a.device, programs, arguments, (*constants, *blocks), WARPS)
    return out
