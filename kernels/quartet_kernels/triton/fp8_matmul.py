"""GEMM over FP8 E5M2 operands that hold MXFP4 values exactly relative to one power of two a row (Hopper, Ada).

    y = alpha * (A @ B.T) * a_scale[:, None] * b_scale[None, :] (+ bias), then the epilogue of the packed GEMM.

Hopper: a persistent kernel, one program a multiprocessor, operands and output through TMA descriptors made on the host
(so no allocator is needed in autograd's threads). Pointer loads elsewhere: Ada, and operands or outputs that are not
aligned to 16 bytes. Tiles come from a fixed table: the same shapes give the same bits, on every run.

Hopper's FP8 tensor cores keep about 14 bits of a sum. `accumulation="precise"` adds them up in float32 every 128
elements of K, which makes ordinary data exact; "fast" never does.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import cdiv, descriptor, is_hopper, launch, multiprocessors
from .matmul import (
    GROUP_M,
    apply_mask,
    empty_product,
    epilogue_arguments,
    finish,
    load_bias,
    load_words,
    rotate_back,
    tile_of,
)


class Tile(NamedTuple):
    """One row of the table: block sizes, warps, pipeline stages, parts in which the output leaves, and the kernel's
    WARPS."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    parts: int
    rotating_warps: int


SHARED_BYTES = 232448
"""Shared memory a program can have on Hopper."""
SHARED_WAVES = 4
"""Programs a multiprocessor where collectives run beside the product and hold some multiprocessors, which a program
that was meant for one would wait for. Four H200s under FSDP2: steps 3.5% shorter; alone, up to 1.5% longer."""


@triton.jit
def halves(x):
    """Left and right half of the columns of x [ROWS, COLS]."""
    return tl.split(x.reshape(x.shape[0], 2, x.shape[1] // 2).permute(0, 2, 1))


@triton.jit
def store_parts(
    c_desc, v, a_scale, words, row, col, N, b_scale_ptr, bias_ptr, rotation_ptr, rotation_scale,
    BIAS: tl.constexpr, MASK: tl.constexpr, G: tl.constexpr, PIECES: tl.constexpr, PARTS: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """Scale, finish and store float32 accumulators v at (row, col), a part of the columns at a time.

    Parts need less shared memory for the way out, which leaves room for a stage of operands, and fewer registers.
    """
    COLS: tl.constexpr = v.shape[1]
    if PARTS > 1:
        left, right = halves(v)
        words_left, words_right = halves(words) if MASK else (words, words)
        store_parts(
            c_desc, left, a_scale, words_left, row, col, N, b_scale_ptr, bias_ptr, rotation_ptr, rotation_scale,
            BIAS, MASK, G, PIECES, PARTS // 2, WARPS,
        )  # fmt: skip
        store_parts(
            c_desc, right, a_scale, words_right, row, col + COLS // 2, N, b_scale_ptr, bias_ptr, rotation_ptr,
            rotation_scale, BIAS, MASK, G, PIECES, PARTS // 2, WARPS,
        )  # fmt: skip
    else:
        cols = col + tl.arange(0, COLS)
        v = v * a_scale[:, None] * tl.load(b_scale_ptr + cols, mask=cols < N, other=0.0)[None, :]
        if BIAS:
            v = v + load_bias(bias_ptr, col, N, rotation_scale, COLS)[None, :]
        if MASK:
            v = apply_mask(v, words)
        if G:
            v = rotate_back(v, rotation_ptr, G, PIECES, WARPS)
        c_desc.store([row, col], v.to(c_desc.dtype))


@triton.jit(do_not_specialize=["M"])
def fp8_tma_kernel(
    a_desc, b_desc, c_desc, a_scale_ptr, b_scale_ptr, bias_ptr, mask_ptr, rotation_ptr, alpha, rotation_scale, M, N, K,
    BIAS: tl.constexpr, MASK: tl.constexpr, G: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PARTS: tl.constexpr, WARPS: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """A [M, K], B [N, K], C [M, N] by descriptors; float32 scales [M], [N]; programs walk over the tiles.

    WARPS, where not 0, is the number of warps: the walk is flattened and a warp rotates its own rows (`rotate_back`).
    """
    PROMOTE: tl.constexpr = BLOCK_K if PRECISE else None
    tl.assume(tl.cdiv(K, BLOCK_K) > 0)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    # Flattened, the next tile's loads run during this tile's epilogue. That needs a loop with no other wgmma, and costs
    # more than it gives where partial sums are promoted.
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=WARPS > 0):
        tile_m, tile_n = tile_of(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        row = tile_m * BLOCK_M
        col = tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, tl.cdiv(K, BLOCK_K)):
            a = a_desc.load([row, k * BLOCK_K])
            b = b_desc.load([col, k * BLOCK_K])
            acc = tl.dot(a, b.T, acc, max_num_imprecise_acc=PROMOTE)
        rows = (row + tl.arange(0, BLOCK_M)).to(tl.int64)
        a_scale = tl.load(a_scale_ptr + rows, mask=rows < M, other=0.0) * alpha
        words = load_words(mask_ptr, rows, rows < M, col, N, BLOCK_N) if MASK else 0  # one wait for all parts
        store_parts(
            c_desc, acc, a_scale, words, row, col, N, b_scale_ptr, bias_ptr, rotation_ptr, rotation_scale,
            BIAS, MASK, G, PIECES, PARTS, WARPS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def fp8_pointer_kernel(
    a_ptr, b_ptr, c_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, mask_ptr, rotation_ptr, alpha, rotation_scale, M, N, K,
    BIAS: tl.constexpr, MASK: tl.constexpr, G: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """The same product by pointers, one tile a program."""
    PROMOTE: tl.constexpr = BLOCK_K if PRECISE else None
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    rows_in = rows < M
    cols_in = cols < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Triton 3.6 waits after every wgmma of a loop that it cannot prove to run; assume it of this very expression.
    tl.assume(tl.cdiv(K, BLOCK_K) > 0)
    for k in range(0, tl.cdiv(K, BLOCK_K)):
        depth = k * BLOCK_K + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr + rows[:, None] * K + depth[None, :], mask=rows_in[:, None] & (depth < K)[None, :], other=0.0)
        b = tl.load(b_ptr + cols[:, None] * K + depth[None, :], mask=cols_in[:, None] & (depth < K)[None, :], other=0.0)
        acc = tl.dot(a, b.T, acc, max_num_imprecise_acc=PROMOTE)
    a_scale = tl.load(a_scale_ptr + rows, mask=rows_in, other=0.0)
    b_scale = tl.load(b_scale_ptr + cols, mask=cols_in, other=0.0)
    v = acc * (a_scale * alpha)[:, None] * b_scale[None, :]
    v = finish(
        v, rows, rows_in, tile_n * BLOCK_N, N, bias_ptr, mask_ptr, rotation_ptr, rotation_scale, BIAS, MASK, G, PIECES
    )
    inside = rows_in[:, None] & cols_in[None, :]
    tl.store(c_ptr + rows[:, None] * N + cols[None, :], v.to(c_ptr.dtype.element_ty), mask=inside)


def tma_tile(M: int, N: int, programs: int, precise: bool, masked: bool, group: int, out_bytes: int) -> Tile:
    """Tile of the persistent kernel by class of shape, the same for most token counts, so that few kernels compile."""
    if not precise and group < 128 and 2 * cdiv(M, 128) * cdiv(N, 256) > programs:
        block_m, block_n, warps = 128, 256, 8
    elif precise and group <= 32 and 2 * cdiv(M, 256) * cdiv(N, 128) > programs:
        block_m, block_n, warps = 256, 128, 8
    else:
        # More of a tile a warp leaves no registers for a second accumulator, or for a block of more than 32 columns.
        block_m, block_n, warps = 128, 128, 8 if precise or group > 32 else 4
    # A part holds whole rotation blocks; float32 takes three products to rotate back, and registers for them.
    parts = min(2 * out_bytes if group else 2, block_n // max(group, 32))
    # Beside the operands: the output, or the mask and the rotation on their way into registers; barriers.
    outside = block_m * (block_n // parts) * out_bytes + masked * block_m * block_n // 8 + group * group * 4 + 1024
    stages = min(4, (SHARED_BYTES - outside) // ((block_m + block_n) * 128))
    return Tile(block_m, block_n, 128, warps, stages, parts, 0 if precise or group > 32 else warps)


def waves() -> int:
    """Programs a multiprocessor, at most. They change no number: a program computes whole tiles."""
    return SHARED_WAVES if torch.distributed.is_available() and torch.distributed.is_initialized() else 1


def aligned(*tensors: torch.Tensor) -> bool:
    """Whether TMA can read these contiguous matrices: base and row stride multiples of 16 bytes."""
    return all(t.data_ptr() % 16 == 0 and t.stride(0) * t.element_size() % 16 == 0 for t in tensors)


def has_tma(device: torch.device) -> bool:
    """Hopper; the interpreter has descriptors too."""
    return device.type == "cpu" or is_hopper(device)


def matmul(
    a: torch.Tensor, a_scale: torch.Tensor, b: torch.Tensor, b_scale: torch.Tensor, *, alpha: float,
    bias: torch.Tensor | None = None, mask: torch.Tensor | None = None, matrix: torch.Tensor | None = None,
    out_dtype: torch.dtype, accumulation: str = "precise",
) -> torch.Tensor:  # fmt: skip
    """alpha * A @ B.T (+ bias) of FP8 operands with a scale a row, with the backward's epilogue.

    Args:
        a, b: float8_e5m2 [M, K] and [N, K], K a multiple of 32.
        a_scale, b_scale: float32 [M] and [N]; NaN makes its whole row (column) NaN.
        alpha, bias, mask, matrix, out_dtype: as in `matmul.matmul`.
        accumulation: "fast", sums as the tensor core keeps them, or "precise", float32 every 128 elements of K.

    Returns:
        [M, N] of out_dtype.
    """
    M, N, K = a.shape[0], b.shape[0], a.shape[1]
    if M == 0 or N == 0 or K == 0:
        return empty_product(M, N, bias, mask, matrix, out_dtype, a.device)
    a, b = a.contiguous(), b.contiguous()
    out = torch.empty((M, N), dtype=out_dtype, device=a.device)
    runtime, constants = epilogue_arguments(alpha, bias, mask, matrix, a_scale, out_dtype)
    runtime = (a_scale.contiguous(), b_scale.contiguous(), *runtime, M, N, K)
    precise = accumulation == "precise"
    if has_tma(a.device) and aligned(a, b, out):
        programs = multiprocessors(a.device) if a.device.type == "cuda" else 4
        _, masked, group, _ = constants
        tile = tma_tile(M, N, programs, precise, masked, group, out.element_size())
        descriptors = (
            descriptor(a, [tile.block_m, tile.block_k]),
            descriptor(b, [tile.block_n, tile.block_k]),
            descriptor(out, [tile.block_m, tile.block_n // tile.parts]),
        )
        launch(
            fp8_tma_kernel,
            a.device,
            min(waves() * programs, cdiv(M, tile.block_m) * cdiv(N, tile.block_n)),
            (*descriptors, *runtime),
            (*constants, tile.block_m, tile.block_n, tile.block_k, GROUP_M, tile.parts, tile.rotating_warps, precise),
            tile.warps,
            tile.stages,
        )
        return out
    blocks = (128, 128, 128, GROUP_M, precise)
    programs = cdiv(M, 128) * cdiv(N, 128)
    launch(fp8_pointer_kernel, a.device, programs, (a, b, out, *runtime), (*constants, *blocks), 8, 2)
    return out
