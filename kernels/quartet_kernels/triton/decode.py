"""GEMM of a few tokens with packed weights: the decoding step of a language model.

    y = alpha * X @ W.T (+ bias), X [M, K] quantised, W packed MXFP4 [N, K]

With so few tokens the time is that of reading the weights once, so they are read as 4-bit codes and decoded in
registers: two instructions and a half an element, since more would take longer than the memory. A program owns BLOCK_N
rows of W. Its warps share K: warp w multiplies every GROUPS-th group of 32, one small product a group, whose scale is
applied to the float32 result; their sums are added once at the end. No order of additions depends on the schedule.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import INTERPRET
from .matmul import decode_codes

GROUPS = 16  # a program, and its warps
STAGES = 4
FEW_STAGES = 3  # where a program may have less than 160 KB of shared memory
ROWS = 64
FEW_ROWS = 32  # where 64 would leave multiprocessors without a program
MIN_PROGRAMS = 100

# Four bytes to their four low and four high nibbles, each as E2M1 in the top bits of the exponent's end and mantissa of
# a bfloat16, which is the value times 2^-126 (a half becomes a subnormal); one multiplication by 2^126 is exact.
DECODE_ASM = tl.constexpr(
    """
    {
    .reg .b32 p, q, s, t, one, zero;
    mov.b32 one, 0x7E807E80;
    mov.b32 zero, 0x80008000;
    prmt.b32 p, $4, 0, 0x1404;
    prmt.b32 q, $4, 0, 0x3424;
    shl.b32 s, p, 4;
    and.b32 s, s, 0x80008000;
    shr.b32 t, p, 2;
    lop3.b32 t, t, 0x01C001C0, s, 0xEA;
    fma.rn.bf16x2 $0, t, one, zero;
    shl.b32 s, q, 4;
    and.b32 s, s, 0x80008000;
    shr.b32 t, q, 2;
    lop3.b32 t, t, 0x01C001C0, s, 0xEA;
    fma.rn.bf16x2 $1, t, one, zero;
    and.b32 s, p, 0x80008000;
    shr.b32 t, p, 6;
    lop3.b32 t, t, 0x01C001C0, s, 0xEA;
    fma.rn.bf16x2 $2, t, one, zero;
    and.b32 s, q, 0x80008000;
    shr.b32 t, q, 6;
    lop3.b32 t, t, 0x01C001C0, s, 0xEA;
    fma.rn.bf16x2 $3, t, one, zero;
    }
    """
)


@triton.jit
def decode_pairs(codes, NVIDIA: tl.constexpr):
    """E2M1 values of the low and of the high nibbles of uint8 codes: two bfloat16 tensors (float32 interpreted)."""
    if NVIDIA:
        even, odd = tl.inline_asm_elementwise(
            DECODE_ASM, "=r,=r,=r,=r,r", [codes], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        DTYPE: tl.constexpr = tl.float32 if INTERPRET else tl.bfloat16
        even, odd = decode_codes(codes & 15, 1.0).to(DTYPE), decode_codes(codes >> 4, 1.0).to(DTYPE)
    return even, odd


@triton.jit
def load_pairs(pointers, inside, DTYPE: tl.constexpr):
    """Even and odd elements of groups of x, bfloat16 pairs read as uint32: two tensors [groups, 16, tokens]."""
    words = tl.load(pointers, mask=inside, other=0)
    even, odd = (words & 0xFFFF).to(tl.uint16), (words >> 16).to(tl.uint16)
    if INTERPRET:
        low = (even.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        high = (odd.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        low, high = even.to(DTYPE, bitcast=True), odd.to(DTYPE, bitcast=True)
    return low, high


@triton.jit(do_not_specialize=["M"])
def decode_kernel(
    x_ptr, codes_ptr, scales_ptr, bias_ptr, out_ptr, alpha, M, N, K,
    BIAS: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, TOKENS: tl.constexpr, STAGES: tl.constexpr,
    WHOLE: tl.constexpr, NVIDIA: tl.constexpr,
):  # fmt: skip
    """x uint32 [M, K/2] (pairs of bfloat16), codes uint8 [N, K/2], scales uint8 [N, K/32], out [M, N].

    WHOLE: N is a multiple of BLOCK_N and K of 32 GROUPS, so that weights are read without masks.
    """
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    wide_rows = rows.to(tl.int64)
    tokens = tl.arange(0, TOKENS)
    local = tl.arange(0, GROUPS)
    # A row's GROUPS * 16 bytes lie together: read as one line, then seen as groups.
    line = tl.arange(0, GROUPS * 16)
    codes_at = codes_ptr + wide_rows[:, None] * (K // 2) + line[None, :]
    if WHOLE:
        # Words of four: single bytes cannot be copied ahead into shared memory.
        words_ptr = scales_ptr.to(tl.pointer_type(tl.uint32))
        scales_at = words_ptr + wide_rows[:, None] * (K // 128) + tl.arange(0, GROUPS // 4)[None, :]
    else:
        scales_at = scales_ptr + wide_rows[:, None] * (K // 32) + local[None, :]
    x_at = (
        x_ptr
        + tokens.to(tl.int64)[None, None, :] * (K // 2)
        + (local[:, None] * 16 + tl.arange(0, 16)[None, :])[:, :, None]
    )
    tokens_in = (tokens < M)[None, None, :]
    rows_in = rows < N
    acc = tl.zeros((GROUPS, BLOCK_N, TOKENS), tl.float32)
    for step in tl.range(0, tl.cdiv(K // 32, GROUPS), num_stages=STAGES):
        if WHOLE:
            codes = tl.load(codes_at)
            words = tl.load(scales_at)
            scales = (words[:, :, None] >> (tl.arange(0, 4) * 8).to(tl.uint32)[None, None, :]) & 0xFF
            scales = scales.reshape(BLOCK_N, GROUPS)
            scales_at += GROUPS // 4
            x_in = tokens_in
        else:
            left = K // 32 - step * GROUPS
            codes = tl.load(codes_at, mask=rows_in[:, None] & (line < left * 16)[None, :], other=0)
            scales = tl.load(scales_at, mask=rows_in[:, None] & (local < left)[None, :], other=0)
            scales_at += GROUPS
            x_in = tokens_in & (local < left)[:, None, None]
        x_even, x_odd = load_pairs(x_at, x_in, tl.bfloat16)
        even, odd = decode_pairs(codes.reshape(BLOCK_N, GROUPS, 16).permute(1, 0, 2), NVIDIA)
        product = tl.dot(even, x_even, input_precision="ieee")
        product = tl.dot(odd, x_odd, product, input_precision="ieee")
        # Bytes 0 and 255 go with codes of zero; as bit fields they are 0 and infinity, which gives 0 and NaN.
        factors = (scales.to(tl.uint32) << 23).to(tl.float32, bitcast=True)
        acc += product * factors.trans(1, 0)[:, :, None]
        codes_at += GROUPS * 16
        x_at += GROUPS * 16
    y = tl.sum(acc, axis=0) * alpha
    if BIAS:
        y += tl.load(bias_ptr + rows, mask=rows_in, other=0.0).to(tl.float32)[:, None]
    out = out_ptr + tokens.to(tl.int64)[None, :] * N + wide_rows[:, None]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=rows_in[:, None] & (tokens < M)[None, :])


@lru_cache
def _stages(device: torch.device) -> int:
    if device.type != "cuda":
        return STAGES
    shared = getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
    return STAGES if shared >= 160 * 1024 else FEW_STAGES


def decode_matmul(
    x: Tensor, codes: Tensor, scales: Tensor, *, alpha: float, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    """``alpha * X @ W.T + bias`` of a few rows of x.

    Args:
        x: bfloat16 [M, K] of ``code * scale``, 1 <= M <= 32: the operand of backend ``bf16``.
        codes: uint8 [N, K/2], low nibble = even element.
        scales: E8M0 bytes, uint8 [N, K/32]; byte 255 makes its whole column of y NaN.
        alpha: Product of the operands' factors.
        bias: [N], any floating dtype, or None.
        out_dtype: float32, bfloat16 or float16; rounded once, from float32.

    Returns:
        [M, N] of out_dtype.
    """
    (M, K), N = x.shape, codes.shape[0]
    out = torch.empty((M, N), dtype=out_dtype, device=x.device)
    rows = ROWS if triton.cdiv(N, ROWS) >= MIN_PROGRAMS else FEW_ROWS
    nvidia = x.device.type == "cuda" and torch.version.hip is None
    decode_kernel[(triton.cdiv(N, rows),)](
        x.contiguous().view(torch.uint32), codes.contiguous(), scales.contiguous(), out if bias is None else bias, out,
        alpha, M, N, K, BIAS=bias is not None, BLOCK_N=rows, GROUPS=GROUPS, TOKENS=max(8, triton.next_power_of_2(M)),
        STAGES=_stages(x.device), WHOLE=N % rows == 0 and K % (32 * GROUPS) == 0, NVIDIA=nvidia, num_warps=GROUPS,
    )  # fmt: skip
    return out
