"""Linear layers on a few tokens with packed weights: the decoding step of a language model.

    y = alpha * Q(X) @ W.T (+ bias), X [M, K] quantised on the way, W packed MXFP4 [N, K]

With so few tokens the time is that of reading the weights once, and of the instructions that decode them: about 27
for eight codes. So nothing is moved in registers: a lane loads 16 bytes, the group of 32 codes of one row, and what a
tensor core's fragment (mma.m16n8k16) wants of them is a shift and a mask away, since the order of k is free as long as
X is stored in the same order. The four groups that a product adds up are scaled to their largest scale in float16,
exact as long as their scales are within 2^23; that scale is applied to the float32 result.

X is written once, by a small kernel, as FP8 numbers relative to a power of two for 64 groups, in the order of the
fragments. On Hopper the product is launched before that kernel has ended, and waits for it with its first weights
already on the way. No order of additions depends on the schedule.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import QuartetConfig
from ..rotation import rotation_matrix
from .common import INTERPRET, load_rotation, permute_bytes, quantize_groups, rotate
from .launch import cdiv, launch, multiprocessors, next_power_of_2
from .matmul import decode_codes
from .quantize import contiguous_rows, inverse_root

CHUNK = tl.constexpr(64)  # groups of x that share a scale
WORDS = tl.constexpr(256)  # 32-bit words of x for four groups and eight tokens

MULTIPLY = tl.constexpr(
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9},"
    " {$10, $11, $12, $13};"
)
LOAD = tl.constexpr("ld.global.v4.b32 {$0, $1, $2, $3}, [$4];")
LOAD_ONCE = tl.constexpr("ld.global.L1::no_allocate.v4.b32 {$0, $1, $2, $3}, [$4];")
# Loads do not cross it. Without it the assembler would move those for the next step to its end, to save registers.
KEEP_ORDER = tl.constexpr("bar.warp.sync 0xffffffff; mov.b32 $0, $1;")


@triton.jit
def load_four(pointers, ASM: tl.constexpr):
    """Four uint32 words from pointers to multiples of 16 bytes."""
    if INTERPRET:
        a, b, c, d = tl.load(pointers), tl.load(pointers + 1), tl.load(pointers + 2), tl.load(pointers + 3)
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            ASM, "=r,=r,=r,=r,l", [pointers], dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32), is_pure=False, pack=1
        )
    return a, b, c, d


@triton.jit
def prefetch(pointers):
    """Bring what pointers point to into the L2 cache."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def as_halves(even, odd):
    """Four registers of two float16 numbers, whose upper bytes are the bytes of two words of E5M2."""
    zero = even * 0
    a, b = permute_bytes(even, zero, zero + 0x2404), permute_bytes(odd, zero, zero + 0x2404)  # byte 4 is zero
    return even & 0xFF00FF00, a, odd & 0xFF00FF00, b


@triton.jit
def with_signs(words, signs):
    """The highest bit of each byte of `signs`, the others of `words`."""
    return tl.inline_asm_elementwise(
        "lop3.b32 $0, $1, $2, 0x80808080, 0xE4;", "=r,r,r", [signs, words], dtype=tl.uint32, is_pure=True, pack=1
    )


@triton.jit
def scaled(pair, factor):
    return tl.inline_asm_elementwise(
        "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [pair, factor], dtype=tl.uint32, is_pure=True, pack=1
    )


@triton.jit
def decode_word(word, factor):
    """The eight codes of a word times `factor` (a pair of float16) times 2^-14, in the order of `as_halves`."""
    # E2M1 in the low bits of E5M2; what lies between its sign and the others goes with the bytes that are masked.
    even, odd = with_signs(word << 1, word << 4), with_signs(word >> 3, word)
    a, b, c, d = even & 0x8E008E00, (even << 8) & 0x8E008E00, odd & 0x8E008E00, (odd << 8) & 0x8E008E00
    return scaled(a, factor), scaled(b, factor), scaled(c, factor), scaled(d, factor)


@triton.jit
def join_four(a, b, c, d):
    """[..., 4] of four tensors."""
    four = tl.join(tl.join(a, c), tl.join(b, d))
    return four.reshape(a.shape[0], 4)


@triton.jit
def interpreted_weights(words, exponent, WARPS: tl.constexpr):
    """What the tensor core sees of the four words of each lane: float32 [WARPS, 8, 128]."""
    shifts = (tl.arange(0, 8) * 4).to(tl.uint32)[None, None, :]
    codes = (join_four(words[0], words[1], words[2], words[3])[:, :, None] >> shifts) & 15
    factor = tl.where(exponent == 0, 0.0, ((exponent + (127 - 29)) << 23).to(tl.float32, bitcast=True))
    values = decode_codes(codes, tl.broadcast_to(factor[:, None, None], codes.shape))
    return values.to(tl.float16).to(tl.float32).reshape(WARPS, 8, 128)


@triton.jit
def interpreted_tokens(words, WARPS: tl.constexpr):
    """The same of eight words of x: float32 [WARPS, 8, 128]."""
    shifts = (tl.arange(0, 4) * 8).to(tl.uint32)[None, None, :]
    even = (join_four(words[0], words[2], words[4], words[6])[:, :, None] >> shifts) & 0xFF
    odd = (join_four(words[1], words[3], words[5], words[7])[:, :, None] >> shifts) & 0xFF
    half = (tl.join(even, odd) << 8).to(tl.uint16).to(tl.float16, bitcast=True)
    return half.to(tl.float32).reshape(WARPS, 8, 128)


@triton.jit
def multiply_block(upper, lower, upper_exponent, lower_exponent, x, WARPS: tl.constexpr, TOKENS: tl.constexpr):
    """Products of 128 columns: for each 8 tokens, lane 4 g + q gets tokens 2 q and 2 q + 1 of row g, then of row g + 8.

    `upper` and `lower` are the words of rows g and g + 8, to be multiplied by 2^(exponent - 29), by 0 for exponent 0.
    """
    products = ()
    if INTERPRET:
        a, b = interpreted_weights(upper, upper_exponent, WARPS), interpreted_weights(lower, lower_exponent, WARPS)
        for n in tl.static_range(TOKENS):
            tokens = interpreted_tokens(x[8 * n : 8 * n + 8], WARPS).permute(0, 2, 1)
            products = products + tl.split(tl.dot(a, tokens, input_precision="ieee").reshape(WARPS * 32, 2))
            products = products + tl.split(tl.dot(b, tokens, input_precision="ieee").reshape(WARPS * 32, 2))
    else:
        for _ in tl.static_range(4 * TOKENS):
            products = products + (tl.zeros((WARPS * 32,), tl.float32),)  # type: ignore[assignment]
        for j in tl.static_range(4):
            a = decode_word(upper[j], (upper_exponent * 0x04000400).to(tl.uint32))
            b = decode_word(lower[j], (lower_exponent * 0x04000400).to(tl.uint32))
            more = ()
            for n in tl.static_range(TOKENS):
                v = as_halves(x[8 * n + 2 * j], x[8 * n + 2 * j + 1])
                c = products[4 * n : 4 * n + 4]
                for i in tl.static_range(2):
                    c = tl.inline_asm_elementwise(
                        MULTIPLY, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
                        [a[2 * i], b[2 * i], a[2 * i + 1], b[2 * i + 1], v[2 * i], v[2 * i + 1],
                         c[0], c[1], c[2], c[3]],
                        dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
                    )  # fmt: skip
                more = more + (c[0], c[1], c[2], c[3])  # type: ignore[assignment]
            products = more
    return products


@triton.jit
def load_weights(
    codes_at, scales_at, block, q, K: tl.constexpr, TILES: tl.constexpr, BLOCKS: tl.constexpr, WHOLE: tl.constexpr
):
    """Codes (four words a block) and scale bytes (a word a block) of four groups, of rows g, g + 8 and so on.

    Blocks behind the last are read as the last: there x is zero.
    """
    GROUPS: tl.constexpr = K // 32
    words = ()
    scales = ()
    for b in tl.static_range(BLOCKS):
        group = 4 * (block + b)
        if GROUPS % 4 == 0:
            if not WHOLE:
                group = tl.minimum(group, GROUPS - 4)
            own = group + q
        else:
            own = tl.minimum(group + q, GROUPS - 1)
        for i in tl.static_range(2 * TILES):
            if GROUPS % 4 == 0:
                scale = tl.load((scales_at + (i * 8 * GROUPS + group)).to(tl.pointer_type(tl.uint32)))
            else:
                scale = tl.zeros(q.shape, tl.uint32)
                for t in tl.static_range(4):
                    byte = tl.load(scales_at + (i * 8 * GROUPS) + tl.minimum(group + t, GROUPS - 1))
                    scale |= byte.to(tl.uint32) << (8 * t)
            words = words + load_four(codes_at + (i * K + own * 4), LOAD_ONCE)
            scales = scales + (scale,)  # type: ignore[assignment]
    return words, scales


@triton.jit
def relative_scale(scales, q):
    """Of the four bytes of `scales`: 2^(largest - 127), infinity for 255, and byte number q minus the largest + 29."""
    largest = tl.maximum(
        tl.maximum(scales & 0xFF, (scales >> 8) & 0xFF), tl.maximum((scales >> 16) & 0xFF, scales >> 24)
    ).to(tl.int32)
    own = ((scales >> (8 * q).to(tl.uint32)) & 0xFF).to(tl.int32)
    return (largest << 23).to(tl.float32, bitcast=True), tl.maximum(own - largest + 29, 0)


@triton.jit
def add_four(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit(do_not_specialize=["M"])
def decode_kernel(
    x_ptr, x_scale_ptr, codes_ptr, scales_ptr, bias_ptr, out_ptr, alpha, M, N, K: tl.constexpr,
    TOKENS: tl.constexpr, WARPS: tl.constexpr, TILES: tl.constexpr, BLOCKS: tl.constexpr, AHEAD: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """x uint32 and x_scale uint64 as `quantize_few_kernel` writes them, codes uint32 [N, K/8], scales uint8 [N, K/32],
    out [M, N].

    A program owns TILES times 16 rows of W, which share what is read of x; every step each warp multiplies BLOCKS
    blocks of four groups. AHEAD: while it waits for x, the codes of its second step come into the L2 cache. A tensor
    has one element a thread, so that element 32 w + l is in lane l of warp w, which is what the fragments are made of.
    """
    GROUPS: tl.constexpr = K // 32
    STEPS: tl.constexpr = (GROUPS + 4 * WARPS * BLOCKS - 1) // (4 * WARPS * BLOCKS)
    WHOLE: tl.constexpr = GROUPS % (4 * WARPS * BLOCKS) == 0
    thread = tl.arange(0, 32 * WARPS)
    warp = thread // 32
    lane = thread % 32
    q = lane % 4
    first_row = tl.program_id(0) * (16 * TILES)
    row = (first_row + lane // 4).to(tl.int64)
    codes_at = codes_ptr + row * (K // 8)
    scales_at = scales_ptr + row * GROUPS
    words, scales = load_weights(codes_at, scales_at, warp * BLOCKS, q, K, TILES, BLOCKS, WHOLE)
    if DEPENDENT:  # x and its scale may not have been written
        if AHEAD:
            for i in tl.static_range(2 * TILES):
                for b in tl.static_range(BLOCKS):
                    second = tl.minimum(((WARPS + warp) * BLOCKS + b) * 4 + q, GROUPS - 1)
                    prefetch(codes_at + (i * K + second * 4))
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    total = ()
    for _ in tl.static_range(4 * TILES * TOKENS):
        total = total + (tl.zeros((32 * WARPS,), tl.float32),)  # type: ignore[assignment]
    for step in tl.range(0, STEPS):
        block = (step * WARPS + warp) * BLOCKS
        following = (tl.minimum(step + 1, STEPS - 1) * WARPS + warp) * BLOCKS
        next_words, next_scales = load_weights(codes_at, scales_at, following, q, K, TILES, BLOCKS, WHOLE)
        if not INTERPRET:
            tl.inline_asm_elementwise(KEEP_ORDER, "=r,r", [lane], dtype=tl.int32, is_pure=False, pack=1)
        for b in tl.static_range(BLOCKS):
            x = ()
            for n in tl.static_range(TOKENS):
                x_at = x_ptr + (block * (TOKENS * WORDS) + lane * 4) + (b * TOKENS + n) * WORDS
                x = x + load_four(x_at, LOAD) + load_four(x_at + WORDS // 2, LOAD)
            more = ()
            for t in tl.static_range(TILES):
                upper_scale, upper_exponent = relative_scale(scales[2 * (b * TILES + t)], q)
                lower_scale, lower_exponent = relative_scale(scales[2 * (b * TILES + t) + 1], q)
                upper = words[8 * (b * TILES + t) : 8 * (b * TILES + t) + 4]
                lower = words[8 * (b * TILES + t) + 4 : 8 * (b * TILES + t) + 8]
                products = multiply_block(upper, lower, upper_exponent, lower_exponent, x, WARPS, TOKENS)
                for n in tl.static_range(TOKENS):
                    two = tl.load(x_scale_ptr + ((block + b) // (CHUNK // 4) * (4 * TOKENS) + 4 * n + q))
                    left = two.to(tl.uint32).to(tl.float32, bitcast=True)
                    right = (two >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
                    c = total[4 * (t * TOKENS + n) : 4 * (t * TOKENS + n) + 4]
                    more = more + (  # type: ignore[assignment]
                        c[0] + products[4 * n] * (upper_scale * left),
                        c[1] + products[4 * n + 1] * (upper_scale * right),
                        c[2] + products[4 * n + 2] * (lower_scale * left),
                        c[3] + products[4 * n + 3] * (lower_scale * right),
                    )
            total = more
        words = next_words
        scales = next_scales
    lane = tl.arange(0, 32)
    for tn in tl.static_range(TILES * TOKENS):
        # One number a lane: together, the four would lie in one bank of shared memory for all lanes.
        sums = tl.reduce(
            (
                total[4 * tn].reshape(WARPS, 32), total[4 * tn + 1].reshape(WARPS, 32),
                total[4 * tn + 2].reshape(WARPS, 32), total[4 * tn + 3].reshape(WARPS, 32),
            ), 0, add_four,
        )  # fmt: skip
        for i in tl.static_range(4):
            out_row = first_row + (tn // TOKENS * 16 + i // 2 * 8) + lane // 4
            token = tn % TOKENS * 8 + 2 * (lane % 4) + i % 2
            y = sums[i] * alpha
            if bias_ptr is not None:
                y += tl.load(bias_ptr + out_row).to(tl.float32)
            tl.store(out_ptr + (token.to(tl.int64) * N + out_row), y.to(out_ptr.dtype.element_ty), mask=token < M)


@triton.jit(do_not_specialize=["n_groups"])
def quantize_few_kernel(
    x_ptr, matrix_ptr, data_ptr, scale_ptr, n_groups, factor, row_stride,
    G: tl.constexpr, METHOD: tl.constexpr, RULE: tl.constexpr, R: tl.constexpr, TOKENS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """R groups of a token of x [M, 32 n_groups] a program, padded with zeros to whole chunks of 64 groups.

    data int32 [chunks * 16, TOKENS, 2, 8, 4, 4]: of blocks of four groups, eight tokens, the halves of a group, the
    token, the group, and its words in the order of `quantize_groups`; scale float32 [chunks, 8 TOKENS].
    """
    WIDTH: tl.constexpr = 32 if G == 0 else G
    ROWS: tl.constexpr = R // CHUNK
    block = tl.arange(0, R * 32 // WIDTH)
    column = tl.arange(0, WIDTH)
    tiles = tl.cdiv(n_groups, R)
    token = tl.program_id(0) // tiles
    first = tl.program_id(0) % tiles * R
    matrix = load_rotation(matrix_ptr, None, None, None, G, x_ptr.dtype.element_ty)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    x_at = token.to(tl.int64) * row_stride + (first * 32 + block[:, None] * WIDTH + column[None, :])
    x = tl.load(x_ptr + x_at, mask=(first + block * (WIDTH // 32) < n_groups)[:, None], other=0.0)
    v = rotate(x, matrix, factor)
    chunks = tl.cdiv(n_groups, CHUNK)
    group = first + tl.arange(0, R)
    words_at = (group // 4 * TOKENS + token // 8) * WORDS + token % 8 * 16 + group % 4 * 4
    quantize_groups(
        v, 0, words_at, group < chunks * CHUNK, None, None, None, None, data_ptr, METHOD, RULE, False, 0,
        scale_ptr, first // CHUNK * (8 * TOKENS) + token, chunks * (8 * TOKENS), ROWS, DEALT=8 * TOKENS,
    )  # fmt: skip


@lru_cache
def can_depend(device: torch.device) -> bool:
    """Whether a kernel may begin while the one before it ends."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def quantize_few(x: Tensor, config: QuartetConfig) -> tuple[Tensor, Tensor]:
    """x [M, K] as `decode_kernel` reads it: int32 [blocks, TOKENS, 2, 8, 4, 4] and float32 [chunks, 8 TOKENS], where
    TOKENS is a power of two; what belongs to tokens that there are not is undefined."""
    M, groups = x.shape[0], x.shape[1] // 32
    x = contiguous_rows(x)
    tokens, chunks = next_power_of_2(cdiv(M, 8)), cdiv(groups, CHUNK.value)
    data = torch.empty(chunks * 16, tokens, 2, 8, 4, 4, dtype=torch.int32, device=x.device)
    scale = torch.empty(chunks, 8 * tokens, dtype=torch.float32, device=x.device)
    matrix = rotation_matrix(config.transform_init, config.hadamard_group_size, x.device, x.dtype)
    width = 0 if matrix is None else matrix.shape[0]
    method = (config.statistic, config.scale_rule) if config.forward_method == "quest" else ("abs_max", None)
    tile = 2 * max(width, 32)  # 64 rows of the rotation, as `quantize_forward` multiplies them
    dependent = can_depend(x.device)
    launch(
        quantize_few_kernel,
        x.device,
        M * cdiv(groups, tile),
        (x, matrix, data, scale, groups, inverse_root(max(width, 1)), x.stride(0)),
        (width, *method, tile, tokens, dependent),
        4,
        dependent=dependent,
    )
    return data, scale


FORMS = {
    4: {1: (4, 1, 1, False), 2: (4, 2, 1, False), 4: (4, 1, 1, False)},
    2: {1: (8, 1, 1, False), 2: (4, 1, 2, False), 4: (4, 1, 1, False)},
    0: {1: (8, 1, 2, True), 2: (8, 1, 2, True), 4: (8, 1, 1, False)},
}
"""WARPS, TILES, BLOCKS and AHEAD as measured on an H100, by tiles of 16 rows a multiprocessor (more than), by TOKENS.

The fewer programs each multiprocessor has, the more each of them has to have under way. Not all registers may be taken:
the next call's quantisation starts sooner where it finds room beside the product.
"""


def form(tiles: int, processors: int, tokens: int, hopper: bool) -> tuple[int, int, int, bool]:
    """WARPS, TILES, BLOCKS and AHEAD for so many tiles of 16 rows."""
    if tokens == 4 and not hopper:
        return 8, 1, 1, False  # four warps lack two registers on 8.0
    found = next(choice[tokens] for more_than, choice in FORMS.items() if tiles / processors > more_than)
    return (4, 1, 1, False) if tiles % found[1] else found


def multiply_few(
    data: Tensor,
    scale: Tensor,
    codes: Tensor,
    scales: Tensor,
    tokens: int,
    *,
    alpha: float,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """``alpha * X @ W.T + bias`` of what `quantize_few` made of ``tokens`` tokens.

    codes and scales are aligned to 16 bytes; on Hopper they are read before the stream's last kernel has ended.
    """
    N, K = codes.shape[0], codes.shape[1] * 2
    out = torch.empty((tokens, N), dtype=out_dtype, device=codes.device)
    dependent = can_depend(codes.device)
    warps, tiles, blocks, ahead = form(N // 16, multiprocessors(codes.device), data.shape[1], dependent)
    launch(
        decode_kernel,
        codes.device,
        N // (16 * tiles),
        (data.view(torch.uint32), scale.view(torch.uint64), codes.view(torch.uint32), scales, bias, out)
        + (alpha, tokens, N),
        (K, data.shape[1], warps, tiles, blocks, ahead, dependent),
        warps,
        dependent=dependent,
    )
    return out


def decode_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    *,
    config: QuartetConfig,
    alpha: float,
    bias: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """``alpha * Q(X) @ W.T + bias`` of a few tokens, with the codes of ``quantize_forward``.

    Args:
        x: float32, bfloat16 or float16 [M, K], 1 <= M <= 32, K a multiple of the rotation's width.
        codes: uint8 [N, K/2], low nibble = even element, N a multiple of 16.
        scales: E8M0 bytes, uint8 [N, K/32]; byte 255 makes its whole column of y NaN or infinite.
        config: How x is rotated and quantised. Groups of x more than 28 binades below the largest of their 64 round to
            nearest even, groups of W more than 23 below the largest of their four.
        alpha: Product of the operands' factors.
        bias: [N], any floating dtype, or None.
        out_dtype: float32, bfloat16 or float16; rounded once, from float32.

    Returns:
        [M, N] of out_dtype.
    """
    codes, scales = (t if t.data_ptr() % 16 == 0 else t.clone() for t in (codes.contiguous(), scales.contiguous()))
    bias = None if bias is None else bias.contiguous()
    few = quantize_few(x, config)  # before the product, with nothing between: it waits for all that was before
    return multiply_few(*few, codes, scales, x.shape[0], alpha=alpha, bias=bias, out_dtype=out_dtype)
