"""Portable GEMM over packed MXFP4 operands, and the kernels around it: unrotate, dequantize.

    y = alpha * A @ B.T (+ bias), then zero where the clip mask is 0, then v @ H.T * g**-0.5 per block of g columns.

Codes and scales stay packed in memory; a program decodes `code * 2**(byte - 127)` to bf16 in registers (exact) and
multiplies with float32 accumulation, so the only rounding before the epilogue is that of the float32 sum. Runs on every
GPU that Triton compiles for, and on CPU tensors under Triton's interpreter.
"""

import torch
import triton
import triton.language as tl

from .common import INTERPRET, top_bits
from .launch import cdiv, launch

PACKED_TILES = {9: (128, 128, 64), 10: (128, 128, 64)}
"""(BLOCK_M, BLOCK_N, BLOCK_K) of the packed GEMM by major compute capability (MI300 and MI350 say 9); 8 warps each."""
GROUP_M = 8
"""Rows of tiles that are walked together, see `tile_of`."""
SMALL_PACKED_TILE = (64, 128, 64)  # elsewhere accumulators and operands are both in registers: the larger tile spills


@triton.jit
def decode_codes(codes, factors):
    """Values of 4-bit codes (integers 0..15) times `factors` (float32, same shape), exact in float32.

    The index, moved to the top of a float32 mantissa and the bottom of its exponent, is the magnitude times 2^-126;
    0.5 lands on a subnormal.
    """
    wide = codes.to(tl.uint32)
    bits = ((wide & 7) << 22) | ((wide & 8) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37 * factors  # 2^126


@triton.jit
def decode_scales(scales):
    """2^(byte - 127) of E8M0 bytes as float32; byte 0 is a subnormal, byte 255 is NaN."""
    byte = scales.to(tl.uint32)
    bits = tl.where(byte == 0, 0x00400000, byte << 23)
    bits = tl.where(byte == 255, 0x7FC00000, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def spread_groups(x, ROWS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Repeat each column of x [ROWS, GROUPS] WIDTH times: [ROWS, GROUPS * WIDTH]."""
    return tl.broadcast_to(tl.expand_dims(x, 2), (ROWS, GROUPS, WIDTH)).reshape(ROWS, GROUPS * WIDTH)


@triton.jit
def decode_tile(
    codes_ptr, scales_ptr, rows, rows_in, k_start, K, ROWS: tl.constexpr, BLOCK_K: tl.constexpr, DTYPE: tl.constexpr
):
    """Even and odd elements of a [ROWS, BLOCK_K] tile as two [ROWS, BLOCK_K / 2] tiles; zero outside rows_in and K."""
    pairs = k_start // 2 + tl.arange(0, BLOCK_K // 2)
    groups = k_start // 32 + tl.arange(0, BLOCK_K // 32)
    codes_in = rows_in[:, None] & (pairs < K // 2)[None, :]
    scales_in = rows_in[:, None] & (groups < K // 32)[None, :]
    codes = tl.load(codes_ptr + rows[:, None] * (K // 2) + pairs[None, :], mask=codes_in, other=0)
    scales = tl.load(scales_ptr + rows[:, None] * (K // 32) + groups[None, :], mask=scales_in, other=0)
    factors = spread_groups(decode_scales(scales), ROWS, BLOCK_K // 32, 16)
    return decode_codes(codes & 15, factors).to(DTYPE), decode_codes(codes >> 4, factors).to(DTYPE)


@triton.jit
def multiply_by_signs(x, h_t, PIECES: tl.constexpr):
    """x @ h_t of float32 x [..., G] with h_t of +-1 in bf16: a product of bf16 pieces of x, with float32 sums.

    Three pieces of 8 bits are all 24 bits of a float32; two leave an error of 2^-16, for 16-bit outputs.
    """
    if INTERPRET:
        out = tl.dot(x, h_t.to(tl.float32), input_precision="ieee")
    else:
        high = top_bits(x)
        rest = x - high
        out = tl.dot(high.to(tl.bfloat16), h_t)
        if PIECES == 3:
            middle = top_bits(rest)
            out = tl.dot(middle.to(tl.bfloat16), h_t, out)
            rest = rest - middle
        out = tl.dot(rest.to(tl.bfloat16), h_t, out)
    return out


@triton.jit
def rotate_back(v, rotation_ptr, G: tl.constexpr, PIECES: tl.constexpr, WARPS: tl.constexpr):
    """v @ H.T per block of G columns of float32 v [ROWS, COLS]; the factor g^-1/2 is in v.

    Blocks become rows, not a block-diagonal matrix: 0 * NaN would spoil the neighbours. The rows are ordered so that a
    thread keeps its elements: with WARPS = 0 for a product of the whole, else for one product a warp, which holds every
    WARPS-th 16 rows of an accumulator on Hopper. The latter becomes mma.sync, so the kernel's own wgmma stay pipelined.
    """
    ROWS: tl.constexpr = v.shape[0]
    BLOCKS: tl.constexpr = v.shape[1] // G
    index = tl.arange(0, G)
    h_t = tl.load(rotation_ptr + index[None, :] * G + index[:, None]).to(tl.bfloat16)  # [i, j] = H[j, i]
    if WARPS:
        x = v.reshape(ROWS // (16 * WARPS), WARPS, 16, BLOCKS, G).permute(1, 0, 3, 2, 4)
        x = x.reshape(WARPS, ROWS // WARPS * BLOCKS, G)
        out = multiply_by_signs(x, tl.broadcast_to(h_t[None, :, :], (WARPS, G, G)), PIECES)
        out = out.reshape(WARPS, ROWS // (16 * WARPS), BLOCKS, 16, G).permute(1, 0, 3, 2, 4)
    else:
        x = v.reshape(ROWS, BLOCKS, G).permute(1, 0, 2).reshape(BLOCKS * ROWS, G)
        out = multiply_by_signs(x, h_t, PIECES).reshape(BLOCKS, ROWS, G).permute(1, 0, 2)
    return out.reshape(ROWS, BLOCKS * G)


@triton.jit
def apply_mask(v, words):
    """Zero v [ROWS, COLS] where bit i of int32 words [ROWS, COLS / 32] is 0; a select, so that NaN does not leak."""
    ROWS: tl.constexpr = v.shape[0]
    GROUPS: tl.constexpr = v.shape[1] // 32
    # Bit 8 j + 2 t + p of a word, where t counts the threads that share a row of an accumulator: each shifts
    # a word once, and what is left are constants.
    four = tl.arange(0, 4)
    shifted = words[:, :, None, None, None] >> (2 * four)[None, None, None, :, None]
    bits = (1 << (8 * four[:, None] + tl.arange(0, 2)[None, :]))[None, None, :, None, :]
    return tl.where((shifted & bits) != 0, v.reshape(ROWS, GROUPS, 4, 4, 2), 0.0).reshape(ROWS, GROUPS * 32)


@triton.jit
def load_bias(bias_ptr, cols_start, N, rotation_scale, COLS: tl.constexpr):
    """Bias of COLS columns, float32, times the factor that is in the accumulators."""
    cols = cols_start + tl.arange(0, COLS)
    return tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32) * rotation_scale


@triton.jit
def load_words(mask_ptr, rows, rows_in, cols_start, N, COLS: tl.constexpr):
    """Clip mask int32 [ROWS, COLS / 32] at int64 rows x (cols_start + ...)."""
    groups = cols_start // 32 + tl.arange(0, COLS // 32)
    inside = rows_in[:, None] & (groups < N // 32)[None, :]
    return tl.load(mask_ptr + rows[:, None] * (N // 32) + groups[None, :], mask=inside, other=0)


@triton.jit
def finish(
    v, rows, rows_in, cols_start, N, bias_ptr, mask_ptr, rotation_ptr, rotation_scale,
    BIAS: tl.constexpr, MASK: tl.constexpr, G: tl.constexpr, PIECES: tl.constexpr, WARPS: tl.constexpr = 0,
):  # fmt: skip
    """The common epilogue: bias, clip mask, inverse rotation of float32 v [ROWS, COLS] at rows x (cols_start + ...).

    v holds the rotation's factor already. `rows` is int64. G = 0 means no rotation (and rotation_scale is 1). Columns
    beyond N hold anything: no block of G mixes them in.
    """
    COLS: tl.constexpr = v.shape[1]
    if BIAS:
        v = v + load_bias(bias_ptr, cols_start, N, rotation_scale, COLS)[None, :]
    if MASK:
        v = apply_mask(v, load_words(mask_ptr, rows, rows_in, cols_start, N, COLS))
    if G:
        v = rotate_back(v, rotation_ptr, G, PIECES, WARPS)
    return v


@triton.jit
def tile_of(program, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Tile (row, column) of a program: GROUP_M rows of tiles are walked column by column, so operands stay in L2."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    per_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first = (program // per_group) * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    inside = program % per_group
    return first + inside % height, inside // height


@triton.jit(do_not_specialize=["M"])
def packed_matmul_kernel(
    a_ptr, a_scales_ptr, b_ptr, b_scales_ptr, c_ptr, bias_ptr, mask_ptr, rotation_ptr, alpha, rotation_scale, M, N, K,
    BIAS: tl.constexpr, MASK: tl.constexpr, G: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """A u8 [M, K/2], B u8 [N, K/2], scales u8 [M, K/32], [N, K/32]; C [M, N]; one tile a program.

    The sum over K runs over even and odd elements separately, which saves the interleaving of the two nibbles.
    """
    DTYPE: tl.constexpr = tl.float32 if INTERPRET else tl.bfloat16
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    rows = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    rows_in = rows < M
    cols_in = cols < N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Triton 3.6 waits after every wgmma of a loop that it cannot prove to run; assume it of this very expression.
    tl.assume(tl.cdiv(K, BLOCK_K) > 0)
    for k in range(0, tl.cdiv(K, BLOCK_K)):
        a_even, a_odd = decode_tile(a_ptr, a_scales_ptr, rows, rows_in, k * BLOCK_K, K, BLOCK_M, BLOCK_K, DTYPE)
        b_even, b_odd = decode_tile(b_ptr, b_scales_ptr, cols, cols_in, k * BLOCK_K, K, BLOCK_N, BLOCK_K, DTYPE)
        acc = tl.dot(a_even, b_even.T, acc, input_precision="ieee")
        acc = tl.dot(a_odd, b_odd.T, acc, input_precision="ieee")
    v = finish(
        acc * alpha, rows, rows_in, tile_n * BLOCK_N, N, bias_ptr, mask_ptr, rotation_ptr, rotation_scale,
        BIAS, MASK, G, PIECES,
    )  # fmt: skip
    inside = rows_in[:, None] & cols_in[None, :]
    tl.store(c_ptr + rows[:, None] * N + cols[None, :], v.to(c_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def unrotate_kernel(
    acc_ptr, c_ptr, mask_ptr, rotation_ptr, alpha, rotation_scale, M, N,
    MASK: tl.constexpr, G: tl.constexpr, PIECES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The backward epilogue on float32 acc [M, N] in memory."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    start = (tl.program_id(0) % tiles_n) * BLOCK_N
    rows = (tl.program_id(0) // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = start + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    offsets = rows[:, None] * N + cols[None, :]
    v = tl.load(acc_ptr + offsets, mask=inside, other=0.0) * alpha
    v = finish(v, rows, rows < M, start, N, mask_ptr, mask_ptr, rotation_ptr, rotation_scale, False, MASK, G, PIECES)
    tl.store(c_ptr + offsets, v.to(c_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def dequantize_kernel(codes_ptr, scales_ptr, out_ptr, M, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """out [M, K] = code * scale."""
    tiles_k = tl.cdiv(K, BLOCK_K)
    start = (tl.program_id(0) % tiles_k) * BLOCK_K
    rows = (tl.program_id(0) // tiles_k).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    even, odd = decode_tile(codes_ptr, scales_ptr, rows, rows < M, start, K, BLOCK_M, BLOCK_K, tl.float32)
    cols = start + tl.arange(0, BLOCK_K)
    inside = (rows < M)[:, None] & (cols < K)[None, :]
    value = tl.interleave(even, odd).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows[:, None] * K + cols[None, :], value, mask=inside)


def packed_tile(device: torch.device) -> tuple[int, int, int]:
    """The tile of the packed GEMM on a device; the interpreter takes the larger one, since it pays by the operation."""
    major = torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9
    return PACKED_TILES.get(major, SMALL_PACKED_TILE)


def epilogue_arguments(
    alpha: float, bias: torch.Tensor | None, mask: torch.Tensor | None, matrix: torch.Tensor | None,
    placeholder: torch.Tensor, out_dtype: torch.dtype,
) -> tuple[tuple[torch.Tensor | float, ...], tuple[bool, bool, int, int]]:  # fmt: skip
    """Arguments bias_ptr to rotation_scale and constants BIAS, MASK, G and PIECES of a kernel with the epilogue.

    The rotation's factor is folded into alpha. A pointer that is not read gets the placeholder.
    """
    group = 0 if matrix is None else matrix.shape[0]
    rotation_scale = float(group) ** -0.5 if group else 1.0
    runtime = (
        placeholder if bias is None else bias.contiguous(),
        placeholder if mask is None else mask.contiguous(),
        placeholder if matrix is None else matrix.contiguous(),
        float(alpha * rotation_scale),
        rotation_scale,
    )
    return runtime, (bias is not None, mask is not None, group, 3 if out_dtype == torch.float32 else 2)


def empty_product(
    M: int, N: int, bias: torch.Tensor | None, mask: torch.Tensor | None, matrix: torch.Tensor | None,
    out_dtype: torch.dtype, device: torch.device,
) -> torch.Tensor:  # fmt: skip
    """The product over no elements (K = 0): zeros, or the bias put through the epilogue."""
    if bias is None:
        return torch.zeros((M, N), dtype=out_dtype, device=device)
    acc = bias.to(torch.float32).expand(M, N).contiguous()
    return unrotate(acc, alpha=1.0, mask=mask, matrix=matrix, out_dtype=out_dtype)


def matmul(
    a: torch.Tensor, a_scales: torch.Tensor, b: torch.Tensor, b_scales: torch.Tensor, *, alpha: float,
    bias: torch.Tensor | None = None, mask: torch.Tensor | None = None, matrix: torch.Tensor | None = None,
    out_dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    """alpha * A @ B.T (+ bias) of packed MXFP4 operands, with the backward's epilogue.

    Args:
        a, b: codes, uint8 [M, K/2] and [N, K/2], low nibble = even element.
        a_scales, b_scales: E8M0 bytes, uint8 [M, K/32] and [N, K/32]; byte 255 makes its whole row (column) NaN.
        alpha: product of the operands' factors.
        bias: [N], any floating dtype, or None.
        mask: int32 [M, N/32] or None; where bit i of a word is 0, element i of the group becomes 0 (NaN too).
        matrix: H, float32 [g, g] of +-1, or None; v becomes v @ H.T * g**-0.5 per block of g columns, after the mask.
        out_dtype: float32, bfloat16 or float16; rounded once, from float32.

    Returns:
        [M, N] of out_dtype.
    """
    M, N, K = a.shape[0], b.shape[0], a.shape[1] * 2
    if M == 0 or N == 0 or K == 0:
        return empty_product(M, N, bias, mask, matrix, out_dtype, a.device)
    out = torch.empty((M, N), dtype=out_dtype, device=a.device)
    runtime, constants = epilogue_arguments(alpha, bias, mask, matrix, out, out_dtype)
    tile = packed_tile(a.device)
    operands = (a.contiguous(), a_scales.contiguous(), b.contiguous(), b_scales.contiguous())
    arguments = (*operands, out, *runtime, M, N, K)
    programs = cdiv(M, tile[0]) * cdiv(N, tile[1])
    launch(packed_matmul_kernel, a.device, programs, arguments, (*constants, *tile, GROUP_M), 8)
    return out


def unrotate(
    acc: torch.Tensor, *, alpha: float, mask: torch.Tensor | None, matrix: torch.Tensor | None, out_dtype: torch.dtype,
    out: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The epilogue of `matmul` on a float32 accumulator [M, N] that another GEMM made; returns [M, N] of out_dtype, the
    contiguous ``out``, which may be the accumulator, if there is one."""
    M, N = acc.shape
    if out is None:
        out = torch.empty((M, N), dtype=out_dtype, device=acc.device)
    if out.numel() == 0:
        return out
    (_, *runtime), (_, *constants) = epilogue_arguments(alpha, None, mask, matrix, out, out_dtype)
    arguments = (acc.contiguous(), out, *runtime, M, N)
    launch(unrotate_kernel, acc.device, cdiv(M, 64) * cdiv(N, 128), arguments, (*constants, 64, 128), 4)
    return out


def dequantize(codes: torch.Tensor, scales: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
    """code * scale of packed [M, K/2], [M, K/32] as dtype [M, K]: exact in bf16 and float32; NaN for byte 255."""
    M, K = codes.shape[0], codes.shape[1] * 2
    out = torch.empty((M, K), dtype=dtype, device=codes.device)
    if out.numel() == 0:
        return out
    arguments = (codes.contiguous(), scales.contiguous(), out, M, K)
    launch(dequantize_kernel, codes.device, cdiv(M, 32) * cdiv(K, 256), arguments, (32, 256), 4)
    return out
