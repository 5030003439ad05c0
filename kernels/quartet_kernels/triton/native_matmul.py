"""GEMM over packed MXFP4 operands on FP4 tensor cores, by `tl.dot_scaled`; over MXFP8 operands, too.

Blackwell: `tcgen05.mma kind::mxf4` and `mma.sync kind::mxf4nvf4`; MI350: `v_mfma_scale_f32_32x32x64_f8f6f4`. The same
product, operands and epilogue as `matmul`. Elsewhere Triton decomposes it to bf16: the same numbers, no gain.
MXFP8: `kind::mxf8f6f4` on Blackwell, the same instruction on MI350.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .launch import cdiv, descriptor, launch
from .matmul import GROUP_M, empty_product, epilogue_arguments, finish, tile_of

BLOCK_M, BLOCK_N, BLOCK_K, WARPS = 128, 128, 128, 8
"""One tile for all. What gives FP4 instructions: on 10.x a BLOCK_M that is a multiple of 128, and 4 or 8 warps;
everywhere BLOCK_K of 64 or more. 12.x spills with fewer warps or wider tiles. 10.x has room for two programs, so that
one multiplies while the other ends; there a step of 4-bit codes is twice as long, so that it waits half as often."""


@triton.jit
def load_operand(codes_ptr, scales_ptr, rows, rows_in, k_start, K, BLOCK_K: tl.constexpr, PER_BYTE: tl.constexpr):
    """Codes [ROWS, BLOCK_K / PER_BYTE] and scales [ROWS, BLOCK_K / 32]; outside, code 0 at scale 1 (byte 255 would be
    NaN)."""
    column = k_start // PER_BYTE + tl.arange(0, BLOCK_K // PER_BYTE)
    groups = k_start // 32 + tl.arange(0, BLOCK_K // 32)
    codes_in = rows_in[:, None] & (column < K // PER_BYTE)[None, :]
    scales_in = rows_in[:, None] & (groups < K // 32)[None, :]
    zero = 0 if PER_BYTE == 2 else 0.0
    codes = tl.load(codes_ptr + rows[:, None] * (K // PER_BYTE) + column[None, :], mask=codes_in, other=zero)
    scales = tl.load(scales_ptr + rows[:, None] * (K // 32) + groups[None, :], mask=scales_in, other=127)
    return codes, scales


@triton.jit
def store_tile(
    acc, c_ptr, tile_m, tile_n, M, N, bias_ptr, mask_ptr, rotation_ptr, alpha, rotation_scale,
    BIAS: tl.constexpr, MASK: tl.constexpr, G: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Finish and store the accumulators of a tile."""
    rows = (tile_m * acc.shape[0] + tl.arange(0, acc.shape[0])).to(tl.int64)
    cols = (tile_n * acc.shape[1] + tl.arange(0, acc.shape[1])).to(tl.int64)
    v = finish(
        acc * alpha, rows, rows < M, tile_n * acc.shape[1], N, bias_ptr, mask_ptr, rotation_ptr, rotation_scale,
        BIAS, MASK, G, PIECES,
    )  # fmt: skip
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    tl.store(c_ptr + rows[:, None] * N + cols[None, :], v.to(c_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def native_matmul_kernel(
    a_ptr, a_scales_ptr, b_ptr, b_scales_ptr, c_ptr, bias_ptr, mask_ptr, rotation_ptr, alpha, rotation_scale, M, N, K,
    BIAS: tl.constexpr, MASK: tl.constexpr, G: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    FORMAT: tl.constexpr = "e2m1",
):  # fmt: skip
    """A u8 [M, K/2], B u8 [N, K/2], or fp8e4nv [M, K] and [N, K] of FORMAT "e4m3"; scales u8 [M, K/32], [N, K/32];
    C [M, N]. One tile a program."""
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
    store_tile(
        acc, c_ptr, tile_m, tile_n, M, N, bias_ptr, mask_ptr, rotation_ptr, alpha, rotation_scale,
        BIAS, MASK, G, PIECES,
    )  # fmt: skip


@triton.jit
def load_tiled(desc, row, k_start, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Scales [ROWS, BLOCK_K / 32] of a tile, as `tile_scales` lays them out."""
    scales = desc.load([0, row // 128, k_start // 128, 0, 0]).reshape(ROWS // 128, BLOCK_K // 128, 32, 4, 4)
    return scales.trans(0, 3, 2, 1, 4).reshape(ROWS, BLOCK_K // 32)


@triton.jit(do_not_specialize=["M"])
def native_tma_kernel(
    a_desc, a_scales_desc, b_desc, b_scales_desc, c_ptr, bias_ptr, mask_ptr, rotation_ptr, alpha, rotation_scale,
    M, N, K, BIAS: tl.constexpr, MASK: tl.constexpr, G: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """The same for capability 10.x. Only tiled scales get from shared into tensor memory at once (`tcgen05.cp`); by way
    of registers, each product would be waited for before the next step's operands are asked for."""
    PER_BYTE: tl.constexpr = 2 if FORMAT == "e2m1" else 1
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    row = tile_m * BLOCK_M
    col = tile_n * BLOCK_N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    tl.assume(tl.cdiv(K, BLOCK_K) > 0)
    for k in range(0, tl.cdiv(K, BLOCK_K)):
        a = a_desc.load([row, k * (BLOCK_K // PER_BYTE)])
        b = b_desc.load([col, k * (BLOCK_K // PER_BYTE)])
        a_scales = load_tiled(a_scales_desc, row, k * BLOCK_K, BLOCK_M, BLOCK_K)
        b_scales = load_tiled(b_scales_desc, col, k * BLOCK_K, BLOCK_N, BLOCK_K)
        acc = tl.dot_scaled(a, a_scales, FORMAT, b.T, b_scales, FORMAT, acc)
    store_tile(
        acc, c_ptr, tile_m, tile_n, M, N, bias_ptr, mask_ptr, rotation_ptr, alpha, rotation_scale,
        BIAS, MASK, G, PIECES,
    )  # fmt: skip


def aligned(x: torch.Tensor) -> torch.Tensor:
    """x, contiguous and where TMA can read it: at a multiple of 16 bytes, which views of larger tensors may not be."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def descriptors(x: torch.Tensor, scales: torch.Tensor, rows: int, block_k: int) -> tuple[Any, Any]:
    """TMA descriptors of an operand and of its tiled scales, for blocks of `rows` x `block_k` elements."""
    width = block_k // (2 if x.dtype == torch.uint8 else 1)
    return (
        descriptor(aligned(x), [rows, width]),
        descriptor(scales[None], [1, rows // 128, block_k // 128, 2, 256]),
    )


def matmul(
    a: torch.Tensor, a_scales: torch.Tensor, b: torch.Tensor, b_scales: torch.Tensor, *, alpha: float,
    bias: torch.Tensor | None = None, mask: torch.Tensor | None = None, matrix: torch.Tensor | None = None,
    out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """alpha * A @ B.T (+ bias) of packed operands, with the backward's epilogue; arguments as of `matmul.matmul`.

    Or of MXFP8 operands, float8_e4m3fn [M, K] and [N, K] with scales as of packed ones. Both operands' scales may be
    tiled, see `common.tile_scales`.
    """
    packed = a.dtype == torch.uint8
    M, N, K = a.shape[0], b.shape[0], a.shape[1] * (2 if packed else 1)
    if M == 0 or N == 0 or K == 0:
        return empty_product(M, N, bias, mask, matrix, out_dtype, a.device)
    out = torch.empty((M, N), dtype=out_dtype, device=a.device)
    runtime, constants = epilogue_arguments(alpha, bias, mask, matrix, out, out_dtype)
    block_k, per_byte = BLOCK_K, 2 if packed else 1
    if a_scales.dim() == 4:
        kernel, block_k = native_tma_kernel, BLOCK_K * per_byte
        operands = (*descriptors(a, a_scales, BLOCK_M, block_k), *descriptors(b, b_scales, BLOCK_N, block_k))
    else:
        kernel = native_matmul_kernel
        operands = (a.contiguous(), a_scales.contiguous(), b.contiguous(), b_scales.contiguous())
    blocks = (BLOCK_M, BLOCK_N, block_k, GROUP_M, "e2m1" if packed else "e4m3")
    programs = cdiv(M, BLOCK_M) * cdiv(N, BLOCK_N)
    launch(kernel, a.device, programs, (*operands, out, *runtime, M, N, K), (*constants, *blocks), WARPS)
    return out
