"""What the quantising kernels share: signs, rotation, scale rules, rounding, random bits, stores.

A program holds R groups of 32 as float32 [R, 4, 8]: element 8 t + k of a group at [t, k]. On the GPU these are the
registers of thread t of the four that hold a row of a matrix product's result, so packing needs no exchange.
Every decision is taken on float32 bit fields; no logarithm, no division, no comparison table.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.language.target_info import current_target

from .. import reference

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Triton's interpreter multiplies bfloat16 as integers and casts it wrongly: products are float64, casts by bits."""

PORTABLE = tl.constexpr(INTERPRET.value or torch.version.hip is not None)
"""No PTX: the interpreter and AMD's GPUs take the same numbers from more operations."""

QUEST_SCALE = tl.constexpr(reference.QUEST_SCALE)
MIN_EXPONENT = tl.constexpr(reference.MIN_EXPONENT)
MAX_EXPONENT = tl.constexpr(reference.MAX_EXPONENT)
FIRST_NOT_FINITE = tl.constexpr(0x7F800000)


@lru_cache
def tiles_scales(device: torch.device) -> bool:
    """Whether the tensor cores of a device want scales tiled: those of compute capability 10.x; the interpreter's, too,
    so that tests see them."""
    return device.type == "cpu" or (torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 10)


def tiled_shape(rows: int, groups: int) -> tuple[int, int, int, int]:
    """[rows / 128, groups / 4, 2, 256], rounded up: blocks of 128 x 4 scales, which TMA brings to shared memory as
    `tcgen05.cp` takes them into tensor memory."""
    return (rows + 127) // 128, (groups + 3) // 4, 2, 256


def empty_tiled(rows: int, groups: int, device: torch.device) -> torch.Tensor:
    """Scales uint8 of `tiled_shape`; of groups that do not exist they are 127, since 255 times code 0 is NaN."""
    shape = tiled_shape(rows, groups)
    # Rows that do not exist give elements that are not stored: what is in them does not matter.
    if groups % 4:
        return torch.full(shape, 127, dtype=torch.uint8, device=device)
    return torch.empty(shape, dtype=torch.uint8, device=device)


def tile_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales uint8 [rows, groups] in the layout of `empty_tiled`: [row % 32, row // 32, group] in each block."""
    rows, groups = scales.shape
    padded = torch.nn.functional.pad(scales, (0, -groups % 4, 0, -rows % 128), value=127)
    blocks = padded.view(padded.shape[0] // 128, 4, 32, padded.shape[1] // 4, 4).permute(0, 3, 2, 1, 4)
    return blocks.reshape(padded.shape[0] // 128, padded.shape[1] // 4, 2, 256)


@triton.jit
def power_of_two(exponent):
    """2^exponent as float32, for the exponents -126..127 of normal numbers."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def group_sum(x):
    """Sum of each group of x [R, 4, 8]: [R]."""
    return tl.sum(tl.sum(x, axis=2), axis=1)


@triton.jit
def per_element(x):
    """A number per group, [R], broadcast against [R, 4, 8]."""
    return x[:, None, None]


@triton.jit
def philox_words(seed_ptr, blocks, ROLE: tl.constexpr):
    """The four uint32 words of Philox4x32-10 for uint32 block indices; `seed_ptr` points to int64 [3]."""
    # 32-bit counter words: tl.philox runs another generator on 64-bit ones.
    zero = blocks * 0
    step = zero + tl.load(seed_ptr + 1).to(tl.uint32)
    micro_batch = zero + tl.load(seed_ptr + 2).to(tl.uint32)
    return tl.philox(tl.load(seed_ptr), blocks, step, micro_batch, zero + ROLE)


@triton.jit
def random_bytes(seed_ptr, groups, ROLE: tl.constexpr):
    """8 random bits an element, uint32 [R, 4, 8], of groups with logical indices `groups` [R]; two calls a group."""
    R: tl.constexpr = groups.shape[0]
    blocks = (groups.to(tl.uint32) * 2)[:, None] + tl.arange(0, 2).to(tl.uint32)[None, :]
    w0, w1, w2, w3 = philox_words(seed_ptr, blocks, ROLE)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(R, 4, 2, 1)  # [half, word >> 1, word & 1] -> [t, k >> 2]
    shifts = (tl.arange(0, 4) * 8).to(tl.uint32)[None, None, None, :]
    return ((words >> shifts) & 0xFF).reshape(R, 4, 8)


@triton.jit
def load_signs(signs_ptr, seed_ptr, SIGN_ROLE: tl.constexpr):
    """Input-side signs float32 [32]: those given, else drawn from the seed. Pass one of the two."""
    index = tl.arange(0, 32)
    if signs_ptr is not None:
        signs = tl.load(signs_ptr + index)
    else:
        word, _, _, _ = philox_words(seed_ptr, tl.full((32,), 0, tl.uint32), SIGN_ROLE)
        signs = 1.0 - 2.0 * ((word >> index.to(tl.uint32)) & 1).to(tl.float32)
    return signs


@triton.jit
def to_float32(x):
    """Exact cast; the interpreter's own loses bfloat16 subnormals."""
    if INTERPRET and x.dtype == tl.bfloat16:
        out = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        out = x.to(tl.float32)
    return out


@triton.jit
def load_rotation(matrix_ptr, signs_ptr, seed_ptr, SIGN_ROLE: tl.constexpr, G: tl.constexpr, DTYPE: tl.constexpr):
    """D H, [G, G] of +-1, as `rotate` takes it; None for G = 0."""
    if G == 0:
        matrix = None
    else:
        index = tl.arange(0, G)
        matrix = tl.load(matrix_ptr + index[:, None] * G + index[None, :]).to(tl.float32)
        if signs_ptr is not None or SIGN_ROLE is not None:
            matrix *= load_signs(signs_ptr, seed_ptr, SIGN_ROLE)[:, None]
        if INTERPRET:
            matrix = matrix.to(tl.float64)
        else:
            # A thread of a product's result holds columns 2 t, 2 t + 1 of every 8: deal the columns so that these
            # are 8 consecutive elements. Taking the result back into order then moves nothing.
            matrix = matrix.reshape(G, G // 32, 4, 4, 2).permute(0, 1, 3, 2, 4).reshape(G, G)
            matrix = matrix.to(tl.bfloat16 if DTYPE == tl.float32 else DTYPE)
    return matrix


@triton.jit
def top_bits(x):
    """The part of float32 x that bf16 holds, by truncation: x - top_bits(x) is exact."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def rotate(x, matrix, factor):
    """v = (x D) H g^-1/2 of x [blocks, G] in its own dtype: float32 [blocks * G / 32, 4, 8]; matrix None: v = x.

    Products with +-1 are exact in x's dtype, sums are float32; the factor follows in float32. Blocks are rows: in a
    block-diagonal product 0 * NaN would spoil the neighbours. float32 is taken apart: its own exact product knows no
    tensor core, and holds both operands in registers.
    """
    R: tl.constexpr = x.shape[0] * x.shape[1] // 32
    if matrix is None:
        v = to_float32(x).reshape(R, 4, 8)
    elif INTERPRET:
        v = tl.dot(to_float32(x).to(tl.float64), matrix, out_dtype=tl.float64).to(tl.float32)
        v = v.reshape(R, 4, 8) * factor
    else:
        if x.dtype == matrix.dtype:
            v = tl.dot(x, matrix) * factor
        else:  # float32 as three bfloat16, exact but for what is below 2^-133
            high = top_bits(x)
            rest = x - high
            middle = top_bits(rest)
            # Not one accumulator: Triton gives the warps of chained products rows alone, and 64 rows are for four.
            v = tl.dot((rest - middle).to(tl.bfloat16), matrix) * factor
            v += tl.dot(middle.to(tl.bfloat16), matrix) * factor
            v += tl.dot(high.to(tl.bfloat16), matrix) * factor
        v = v.reshape(R, 4, 4, 2).permute(0, 2, 1, 3).reshape(R, 4, 8)
    return v


@triton.jit
def nan_maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def largest_bits(v):
    """The bit field of each group's largest magnitude, int32 [R]; at least FIRST_NOT_FINITE if one is not finite."""
    magnitude = tl.abs(v)
    if INTERPRET:  # calls a combining function once per element, but its own maximum keeps NaN
        largest = tl.max(tl.max(magnitude.to(tl.int32, bitcast=True), axis=2), axis=1)
    else:
        largest = tl.reduce(tl.reduce(magnitude, 2, nan_maximum), 1, nan_maximum).to(tl.int32, bitcast=True)
    return largest


@triton.jit
def clamp_exponent(exponent):
    return tl.minimum(tl.maximum(exponent, MIN_EXPONENT), MAX_EXPONENT)


@triton.jit
def abs_max_exponent(largest):
    """floor(log2 max|v|) - 2."""
    return clamp_exponent((largest >> 23) - 129)


@triton.jit
def quest_exponent(v, largest, STATISTIC: tl.constexpr, RULE: tl.constexpr):
    """Exponent of QuEST's scale: of `mse`, the one of its two candidates that has the smaller error. Also m and
    w = v 2^-m, exact, or so small that its code is 0: whoever goes on with it needs no registers for v."""
    m = tl.minimum((largest >> 23) - 127, 126)
    if RULE == "floor":
        m = tl.maximum(m, -126)  # 2^m is a normal number, too
    w = v * per_element(power_of_two(-m))  # |w| < 2: squares neither overflow nor vanish
    centred = w
    if STATISTIC == "std":
        centred -= per_element(group_sum(w) * 0.03125)
    square = group_sum(centred * centred) * (0.03125 * QUEST_SCALE * QUEST_SCALE)  # of the scale that is rounded
    if RULE == "floor":  # a square root is approximate to 2^-23 on a GPU, more than a decision needs
        exponent = ((tl.sqrt(square) * power_of_two(m) + 1e-8).to(tl.int32, bitcast=True) >> 23) - 127
    else:
        doubled = (square.to(tl.int32, bitcast=True) >> 23) - 127  # floor(log2 t^2): odd where t is nearer to the next
        if RULE == "nearest":
            doubled += 1
        exponent = (doubled >> 1) + m
    if RULE == "mse":  # where the next exponent is out of range, both are clamped to the same
        exponent += wider_is_better(w, per_element(power_of_two(doubled >> 1))).to(tl.int32)
    clamped = clamp_exponent(exponent)
    if STATISTIC == "std":  # a constant group has no centred deviation
        clamped = tl.where(square == 0, abs_max_exponent(largest), clamped)
    return clamped, w, m


@triton.jit
def positive_difference(a, b):
    """max(|a| - |b|, 0), on a GPU at most 1."""
    if PORTABLE:
        out = tl.maximum(tl.abs(a) - tl.abs(b), 0.0)
    else:  # floating-point arithmetic has twice the rate of comparisons, and takes magnitudes for nothing
        out = tl.inline_asm_elementwise(
            "{.reg .f32 a, b; abs.f32 a, $1; abs.f32 b, $2; sub.rn.sat.f32 $0, a, b;}",
            "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return out


@triton.jit
def wider_is_better(w, scale):
    """Whether twice the scale has the smaller squared error, for groups of w [R, 4, 8], |w| < 2.

    For u = |w| / scale the two errors of an element differ by |u - wide|^2 - |u - narrow|^2, which is
        1/4 - d for u at a distance d <= 1/4 from 1/2 or 3/2, which only the narrower grid has, and
        -4 (u - 7) from 7 on, and 8 (u - 10) less from 10 on, where the wider grid has 8 and 12 instead of 6,
    and 0 between: rounding to both grids takes twice the operations. Where u - 7 is cut off, at 1 / scale, it decides.
    """
    steps = positive_difference(0.25 * scale, tl.abs(tl.abs(w) - scale) - 0.5 * scale)
    beyond = positive_difference(w, 7.0 * scale) + 2.0 * positive_difference(w, 10.0 * scale)
    return group_sum(steps - 4.0 * beyond) < 0


@triton.jit
def rounding_shift(u):
    """What to add to |u| < 8 so that the float32 sum is rounded to the E2M1 grid (ties to even) and ends in its index.

    The grid's step is 2^(e-1), with e the exponent of |u| but at least 0; it is the last bit of 2^(22+e). The index is
    the number of steps plus 2 e: 2 e comes from the exponent field, and 4194307 = 2^22 (1 + 6 * 2^-23) makes what comes
    with it, 2 * 149 + 6, divisible by 8.
    """
    power = (u.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    shift = (tl.maximum(power, 1.0) * 4194307.0).to(tl.int32, bitcast=True)
    return (shift + (shift >> 22)).to(tl.float32, bitcast=True)


@triton.jit
def signed_rounding(u, unit):
    """u, |u| < 8 unit, rounded to `unit` (a power of two) times the E2M1 grid, ties to even; -0 becomes 0."""
    power = (u.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    shift = tl.maximum(power, unit) * 6291456.0  # 1.5 * 2^22: its last bit is a step, its middle leaves room for signs
    if PORTABLE:
        out = (u + shift) - shift
    else:  # never as one operation with the product that u is
        out = tl.inline_asm_elementwise(
            "add.rn.f32 $0, $1, $2; sub.rn.f32 $0, $0, $2;",
            "=&f,f,f", [u, shift], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return out


@triton.jit
def values_of(indices):
    """{0, .5, 1, 1.5, 2, 3, 4, 6} of indices 0..7: as leading bits they are 2^-126 times that, .5 a subnormal."""
    return (indices << 22).to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126


@triton.jit
def signed(values, bits):
    """`values` >= 0, float32, with the sign that is the highest bit of uint32 `bits`."""
    return (values.to(tl.uint32, bitcast=True) | (bits & 0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def stochastic_indices(magnitude, random):
    """Indices 0..7 of magnitudes < 6: up iff (magnitude - low) / (high - low) >= (255.5 - random) / 256."""
    # 22 fraction bits below the index; under 1 the grid is uniform, and what truncation drops cannot decide.
    if PORTABLE:
        bits = magnitude.to(tl.uint32, bitcast=True) - (252 << 22)
        fixed = tl.where(magnitude < 1.0, (magnitude * 8388608.0).to(tl.int32).to(tl.uint32), bits)
    else:  # 2^-126 times that, rounded toward zero; numbers under 1 become subnormal
        fixed = tl.inline_asm_elementwise(
            "mul.rz.f32 $0, $1, 0f00800000;", "=r,f", [magnitude], dtype=tl.uint32, is_pure=True, pack=1
        )
    return (fixed + (random << 14) + (1 << 13)) >> 22


@triton.jit
def to_bfloat16(x):
    """Cast of float32 numbers that bfloat16 holds exactly."""
    if INTERPRET:
        out = (x.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        out = x.to(tl.bfloat16)
    return out


NOT_FINITE = tl.constexpr(1000)
"""Key of a row with a group that is not finite."""


@triton.jit
def fp8_byte(x):
    """E5M2 byte of float32 numbers, to nearest even: the upper byte of float16. Only for the interpreter."""
    half = x.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)
    return (half + 0x7F + ((half >> 8) & 1)) >> 8


@triton.jit
def fp8_word(a, b, c, d):
    """Four float32 numbers as E5M2 bytes, to nearest even, in one uint32."""
    if INTERPRET:  # casts to FP8 wrongly
        out = fp8_byte(a) | (fp8_byte(b) << 8) | (fp8_byte(c) << 16) | (fp8_byte(d) << 24)
    else:
        out = tl.inline_asm_elementwise(
            "{.reg .b16 low, high; cvt.rn.satfinite.e5m2x2.f32 low, $2, $1;"
            " cvt.rn.satfinite.e5m2x2.f32 high, $4, $3; mov.b32 $0, {low, high};}",
            "=r,f,f,f,f", [a, b, c, d], dtype=tl.uint32, is_pure=True, pack=1,
        )  # fmt: skip
    return out


@triton.jit
def permute_bytes(low, high, selectors):
    """PTX's prmt: byte i of the result is byte number (hexadecimal digit i of the selector, 0..7) of high:low."""
    if PORTABLE:
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


@triton.jit
def fp8_words(words, factor):
    """FP8 numbers code * factor of uint32 words of eight codes, along a new last axis of two words; factor broadcasts
    against `words`."""
    zero = factor * 0.0
    low = fp8_word(zero, 0.5 * factor, factor, 1.5 * factor)
    high = fp8_word(2.0 * factor, 3.0 * factor, 4.0 * factor, 6.0 * factor)
    low = tl.broadcast_to(low, words.shape)
    high = tl.broadcast_to(high, words.shape)
    return tl.join(look_up(low, high, words, words, 0x5140), look_up(low, high, words >> 16, words, 0x7362))


@triton.jit
def row_key(byte, used):
    """What a row's maximum is taken of: NOT_FINITE, or scale byte + 1 of a group with a non-zero code, or 0."""
    return tl.where(byte == 255, NOT_FINITE, tl.where(used, byte + 1, 0))


@triton.jit
def row_top(largest):
    """The row exponent E + 127 of a row whose largest key is given; under NOT_FINITE all data round to zero."""
    return tl.maximum(largest - 1, 127 - 113)


@triton.jit
def row_scale_of(largest):
    """Row scale 2^(E - 13), 1 without a non-zero code, NaN where a group is not finite."""
    scale = ((tl.minimum(row_top(largest), 254) - 13) << 23).to(tl.float32, bitcast=True)
    return tl.where(largest == NOT_FINITE, float("nan"), tl.where(largest == 0, 1.0, scale))


@triton.jit
def group_factor(byte, top):
    """2^(e - E + 13): what a group's codes are multiplied by."""
    exponent = tl.maximum(byte - top + 13, -100)  # far below the span everything rounds to zero
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def store_row_scales(byte, used, row_scale_ptr, first_row, n_rows, ROWS: tl.constexpr, STRIDE: tl.constexpr):
    """Row scales, STRIDE apart, of ROWS rows with these scale bytes, of groups that are `used` (None: where the byte is
    not 0); returns the row exponents, + 127, of each group's row."""
    R: tl.constexpr = byte.shape[0]
    if used is None:
        largest = tl.max(byte.reshape(ROWS, R // ROWS), axis=1)
        largest = row_key(largest, largest != 0)
    else:
        largest = tl.max(row_key(byte, used).reshape(ROWS, R // ROWS), axis=1)
    row = first_row + tl.arange(0, ROWS) * STRIDE
    tl.store(row_scale_ptr + row, row_scale_of(largest), mask=row < n_rows)
    return tl.broadcast_to(row_top(largest)[:, None], (ROWS, R // ROWS)).reshape(R)


@triton.jit
def is_below_six(magnitude):
    """1.0 where magnitude < 6, else 0.0, also for NaN; the neighbours of 6 are 2^-22 away or more."""
    if PORTABLE:
        out = tl.where(magnitude < 6.0, 1.0, 0.0)
    else:
        offset = tl.full(magnitude.shape, 100663296.0, tl.float32)
        out = tl.inline_asm_elementwise(
            "fma.rn.sat.f32 $0, $1, 0fCB800000, $2;",
            "=f,f,f", [magnitude, offset], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return out


@triton.jit
def split_last(x):
    """The eight parts of x [R, 4, 8], each [R, 4]."""
    even, odd = tl.split(x.reshape(x.shape[0], 4, 2, 2, 2))
    even_low, even_high = tl.split(even)
    odd_low, odd_high = tl.split(odd)
    x0, x4 = tl.split(even_low)
    x2, x6 = tl.split(even_high)
    x1, x5 = tl.split(odd_low)
    x3, x7 = tl.split(odd_high)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def gather_bytes(a, b, c, d, BYTE: tl.constexpr):
    """Byte number BYTE of each of four words."""
    selector = a * 0 + (BYTE | ((4 + BYTE) << 4))
    return permute_bytes(permute_bytes(a, b, selector), permute_bytes(c, d, selector), a * 0 + 0x5410)


@triton.jit
def pack_words(indices, signs):
    """Words [R, 4] of eight codes: lowest three bits of uint32 `indices` [R, 4, 8], highest bit of `signs`."""
    if INTERPRET:
        shifts = (tl.arange(0, 8) * 4).to(tl.uint32)[None, None, :]
        words = tl.sum(((indices & 7) | ((signs >> 31) << 3)) << shifts, axis=2)
    else:
        i0, i1, i2, i3, i4, i5, i6, i7 = split_last(indices)
        s0, s1, s2, s3, s4, s5, s6, s7 = split_last(signs)
        words = (gather_bytes(i0, i2, i4, i6, 0) & 0x07070707) | ((gather_bytes(i1, i3, i5, i7, 0) << 4) & 0x70707070)
        words |= (gather_bytes(s0, s2, s4, s6, 3) >> 4) & 0x08080808
        words |= gather_bytes(s1, s3, s5, s7, 3) & 0x80808080
    return words


@triton.constexpr_function
def cuda_arch():
    """What kernels are compiled for now, 90 for 9.0; 0 where that is no NVIDIA GPU."""
    target = None if PORTABLE.value else current_target()
    return target.arch if target is not None and target.backend == "cuda" else 0


@triton.constexpr_function
def converts_to_e2m1():
    """Whether the GPU that is compiled for has `cvt.rn.satfinite.e2m1x2`: 10.x and 12.x alike. Its stochastic sister
    `cvt.rs.satfinite.e2m1x4` is left alone: 12.x lacks it, and it does not take this package's random bits."""
    return cuda_arch() >= 100


@triton.jit
def round_and_pack(u):
    """Words [R, 4] of eight codes: u [R, 4, 8] rounded to E2M1, ties to even, saturating at 6; NaN becomes 6."""
    x0, x1, x2, x3, x4, x5, x6, x7 = split_last(u)
    return tl.inline_asm_elementwise(
        "{.reg .b8 p, q, r, s; cvt.rn.satfinite.e2m1x2.f32 p, $2, $1; cvt.rn.satfinite.e2m1x2.f32 q, $4, $3;"
        " cvt.rn.satfinite.e2m1x2.f32 r, $6, $5; cvt.rn.satfinite.e2m1x2.f32 s, $8, $7; mov.b32 $0, {p, q, r, s};}",
        "=r,f,f,f,f,f,f,f,f", [x0, x1, x2, x3, x4, x5, x6, x7], dtype=tl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.constexpr_function
def rounds_pairs():
    """Whether to use `rounded_pairs`: on Hopper, where it is faster. It takes registers, which products with both
    operands in registers do not leave."""
    return cuda_arch() // 10 == 9


@triton.jit
def rounded_pair(a, b, sign_a, sign_b, CLIP: tl.constexpr):
    """Magnitudes rounded to the E2M1 grid, ties to even, and saturated at 6 if CLIP (else they are < 6), times 2^-14,
    with the highest bits of uint32 as signs: two float16 in a uint32, each the sign, 3 zeros, the index, 9 zeros.

    Dekker's splitting by 2^22 + 1 leaves two bits of a number >= 1; smaller ones, split as 1 is, leave a multiple of
    1/2. That ties go to even is not in its proof: all float32 between 1/8 and 64 were compared.
    """
    clip: tl.constexpr = " min.f16x2 h, h, limit;" if CLIP else ""
    return tl.inline_asm_elementwise(
        "{.reg .f32 x, y, s, t; .reg .b32 h, limit, signs; mov.b32 limit, 0x0E000E00;"
        " max.f32 s, $1, 0f3F800000; mul.rn.f32 s, s, 0f43800002; neg.f32 x, s; fma.rn.f32 x, $1, 0f38800000, x;"
        " max.f32 t, $2, 0f3F800000; mul.rn.f32 t, t, 0f43800002; neg.f32 y, t; fma.rn.f32 y, $2, 0f38800000, y;"
        " add.rn.f32 x, x, s; add.rn.f32 y, y, t; cvt.rn.f16x2.f32 h, y, x;" + clip
        + " prmt.b32 signs, $3, $4, 0x7632; lop3.b32 $0, h, signs, 0x80008000, 0xF8;}",
        "=r,f,f,r,r", [a, b, sign_a, sign_b], dtype=tl.uint32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def rounded_pairs(magnitude, v, CLIP: tl.constexpr):
    """`rounded_pair` of magnitudes [R, 4, 8] with the signs of v: elements 0 and 2, 4 and 6, 1 and 3, 5 and 7."""
    a0, a1, a2, a3, a4, a5, a6, a7 = split_last(magnitude)
    s0, s1, s2, s3, s4, s5, s6, s7 = split_last(v.to(tl.uint32, bitcast=True))
    p02 = rounded_pair(a0, a2, s0, s2, CLIP)
    p46 = rounded_pair(a4, a6, s4, s6, CLIP)
    p13 = rounded_pair(a1, a3, s1, s3, CLIP)
    p57 = rounded_pair(a5, a7, s5, s7, CLIP)
    return p02, p46, p13, p57


@triton.jit
def codes_of_pairs(p02, p46, p13, p57):
    """Words of eight codes from `rounded_pairs`."""
    upper = p02 * 0 + 0x7531
    even = permute_bytes(p02, p46, upper)  # in each byte the sign on top, the index above its lowest bit
    odd = permute_bytes(p13, p57, upper)
    indices = ((even >> 1) & 0x07070707) | ((odd << 3) & 0xF8F8F8F8)
    signs = ((even >> 4) & 0x7F7F7F7F) | (odd & 0x80808080)
    return indices | (signs & 0x88888888)


@triton.jit
def fp8_pair(pair, factor):
    """Two numbers 2^-14 code, float16, times 2^14 factor as E5M2 bytes; below float16's they are 0 in either."""
    return tl.inline_asm_elementwise(
        "{.reg .b32 h, f, k; .reg .b16 bytes; mov.b32 k, 0x74007400; cvt.rn.f16x2.f32 f, $2, $2;"
        " mul.rn.f16x2 h, $1, k; mul.rn.f16x2 h, h, f; cvt.rn.satfinite.e5m2x2.f16x2 bytes, h; cvt.u32.u16 $0, bytes;}",
        "=r,r,f", [pair, factor], dtype=tl.uint32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def fp8_of_pairs(p02, p46, p13, p57, factor):
    """FP8 numbers code * factor from `rounded_pairs`, along a new last axis of two words."""
    order = p02 * 0 + 0x5140
    low = permute_bytes(fp8_pair(p02, factor), fp8_pair(p13, factor), order)
    high = permute_bytes(fp8_pair(p46, factor), fp8_pair(p57, factor), order)
    return tl.join(low, high)


@triton.jit
def tiled_scale_at(row, group, per_row):
    """Where the scale of a group lies in the layout of `tile_scales`: row of the operand, group in it, groups a row."""
    tile = (row // 128).to(tl.int64) * tl.cdiv(per_row, 4) + group // 4
    return tile * 512 + (row % 32 * 16 + row // 32 % 4 * 4 + group % 4)


@triton.constexpr_function
def stores_directly():
    """Whether `store_directly` suits the results of products: four threads hold a group, but with the tensor memory of
    10.x."""
    return cuda_arch() // 10 not in (0, 10)


@triton.jit
def store_directly(pointers, first, second, inside, KIND: tl.constexpr):
    """Store the lowest bits of int32 `first`, as many as KIND says, where `inside`; "v2.b32" is `first` and `second`.

    `tl.store` would have every thread write 16 bytes and, with two barriers each, send all through shared memory for
    that. What a warp holds is contiguous as it is.
    """
    operand: tl.constexpr = "{$2, $3}" if KIND == "v2.b32" else "$2"
    tl.inline_asm_elementwise(
        "{.reg .pred inside; setp.ne.b32 inside, $4, 0; @inside st.global." + KIND + " [$1], " + operand
        + "; mov.b32 $0, 0;}",
        "=r,l,r,r,r", [pointers.to(tl.int64), first, second, inside.to(tl.int32)],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def store(pointers, values, inside, DIRECT: tl.constexpr):
    """Store int32 as int32 or uint8 where `inside`, with DIRECT by `store_directly`."""
    if DIRECT:
        KIND: tl.constexpr = "b32" if pointers.dtype.element_ty.primitive_bitwidth == 32 else "b8"
        store_directly(pointers, values, values, inside, KIND)
    else:
        tl.store(pointers, values.to(pointers.dtype.element_ty), mask=inside)


@triton.jit
def quantize_groups(
    v, first, local, inside, seed_ptr, codes_ptr, scales_ptr, mask_ptr, data_ptr,
    METHOD: tl.constexpr, RULE: tl.constexpr, STOCHASTIC: tl.constexpr, ROLE: tl.constexpr,
    row_scale_ptr=None, first_row=0, n_rows=0, ROWS: tl.constexpr = 1, tiled_ptr=None, per_row=1,
    DEALT: tl.constexpr = None, DIRECT: tl.constexpr = False, top=None,
):  # fmt: skip
    """Quantise v [R, 4, 8] and store it as the operand's groups number `first` + `local` (a scalar and [R], one of
    them int64; row-major) where `inside`, with DIRECT by `store_directly`.

    Outputs, each None where it is not wanted: codes int32 [groups, 4], scales uint8 [groups], clip mask uint8
    [groups, 4], data bfloat16 [groups, 32], `tiled_ptr` the scales again as in `tiled_scale_at`, for rows of `per_row`
    groups. METHOD is "rms" or "std" (QuEST with RULE) or "abs_max" (3/4 of v is rounded).

    With `row_scale_ptr`, data are FP8, int32 [groups, 8], relative to row scales, and v holds ROWS whole rows of the
    operand from `first_row` on, padded with zeros; with `top`, they are FP8 relative to these row exponents [R].
    DEALT: `local` is where the words of a group start, its words lie as `decode.py` reads them, of every 8 elements
    first the even, then the odd ones, and row scales are DEALT apart. Returns the scale bytes, int32 [R].
    """
    groups = first + local
    R: tl.constexpr = v.shape[0]
    STRIDE: tl.constexpr = 1 if DEALT is None else DEALT
    # Rounded in the scale of the FP8 numbers, where it is they that are stored.
    AT_ONCE: tl.constexpr = METHOD == "abs_max" and codes_ptr is None and not STOCHASTIC
    largest = largest_bits(v)
    zero = largest == 0
    finite = largest < FIRST_NOT_FINITE
    if METHOD == "abs_max":
        exponent = abs_max_exponent(largest)
    else:
        exponent, v, m = quest_exponent(v, largest, METHOD, RULE)  # of v, the sign is all that matters from here on
    byte = tl.where(finite, tl.where(zero, 0, exponent + 127), 255)
    if row_scale_ptr is not None and AT_ONCE:
        top = store_row_scales(byte, None, row_scale_ptr, first_row, n_rows, ROWS, STRIDE)

    if METHOD == "abs_max":
        unit = group_factor(byte, top) if AT_ONCE and top is not None else 1.0
        # One factor: the inner product is exact, or so small that its code is 0 in any case. The magnitude is taken of
        # the product, which keeps the compiler from rounding product and sum at once.
        u = v * per_element(power_of_two(-exponent) * 0.75 * unit)
        magnitude = tl.abs(u)
    else:
        magnitude = tl.abs(v) * per_element(power_of_two(m - exponent))
    PAIRS: tl.constexpr = not STOCHASTIC and rounds_pairs()

    if STOCHASTIC:
        rounded = stochastic_indices(magnitude, random_bytes(seed_ptr, groups, ROLE))
        values = values_of(rounded)
    elif AT_ONCE:
        values = signed_rounding(u, per_element(unit) if top is not None else 1.0)
    else:
        clipped = magnitude if METHOD == "abs_max" else tl.minimum(magnitude, 6.0)
        shift = rounding_shift(u if METHOD == "abs_max" else clipped)  # reads an exponent: no need of a magnitude
        rounded = clipped + shift
        values = rounded - shift

    if not AT_ONCE:
        values = signed(values, v.to(tl.uint32, bitcast=True))

    if codes_ptr is not None:
        if not STOCHASTIC and converts_to_e2m1():
            words = round_and_pack(signed(magnitude, v.to(tl.uint32, bitcast=True)))
        elif PAIRS:
            p02, p46, p13, p57 = rounded_pairs(magnitude, v, METHOD != "abs_max")
            words = codes_of_pairs(p02, p46, p13, p57).to(tl.int32, bitcast=True)
        else:
            words = pack_words(rounded.to(tl.uint32, bitcast=True), v.to(tl.uint32, bitcast=True))
            words = words.to(tl.int32, bitcast=True)
        usable = ((byte - 1).to(tl.uint32, bitcast=True) < 254)[:, None]
        words = tl.where(usable, words, 0)
        words_at = codes_ptr + first * 4 + (local[:, None] * 4 + tl.arange(0, 4)[None, :])
        store(words_at, words, inside[:, None], DIRECT)
    if scales_ptr is not None:
        store(scales_ptr + first + local, byte, inside, DIRECT)
    if tiled_ptr is not None:
        index = groups.to(tl.int32)
        tl.store(tiled_ptr + tiled_scale_at(index // per_row, index % per_row, per_row), byte.to(tl.uint8), mask=inside)
    if mask_ptr is not None:
        weights = ((127 + tl.arange(0, 8)) << 23).to(tl.float32, bitcast=True)[None, None, :]
        keep = tl.sum(is_below_six(magnitude) * weights, axis=2)
        keep = (keep + 8388608.0).to(tl.int32, bitcast=True) & 0xFF
        keep = tl.where(finite[:, None], keep, 0xFF)
        keep_at = mask_ptr + first * 4 + (local[:, None] * 4 + tl.arange(0, 4)[None, :])
        store(keep_at, keep, inside[:, None], DIRECT)
    if row_scale_ptr is not None and not AT_ONCE:
        used = None
        if METHOD != "abs_max" and RULE == "floor":  # gives tiny groups codes of zero under a scale that is not tiny
            used = tl.max(tl.max(tl.abs(values), axis=2), axis=1) != 0
        top = store_row_scales(byte, used, row_scale_ptr, first_row, n_rows, ROWS, STRIDE)
    if top is not None:
        factor = group_factor(byte, top)
        if codes_ptr is not None and PAIRS:
            data = tl.where(usable[:, :, None], fp8_of_pairs(p02, p46, p13, p57, factor[:, None]), 0)
        elif codes_ptr is not None:
            data = fp8_words(words.to(tl.uint32, bitcast=True), factor[:, None])
        else:
            scaled = (values if AT_ONCE else values * per_element(factor)).reshape(R, 4, 2, 2, 2)
            even, odd = tl.split(scaled.permute(0, 1, 4, 2, 3) if DEALT is not None else scaled)
            a, c = tl.split(even)
            b, d = tl.split(odd)
            data = tl.where(per_element(finite), fp8_word(a, b, c, d), 0)
        if DIRECT:
            even, odd = tl.split(data)
            data_at = data_ptr + first * 8 + (local[:, None] * 8 + tl.arange(0, 4)[None, :] * 2)
            store_directly(data_at, even, odd, inside[:, None], "v2.b32")
        else:
            four, two = tl.arange(0, 4)[:, None], tl.arange(0, 2)[None, :]
            if DEALT is not None:
                data_at = groups[:, None, None] + (four // 2 * 128 + four % 2 * 2 + two)[None, :, :]
            else:
                data_at = (groups * 8)[:, None, None] + (four * 2 + two)[None, :, :]
            tl.store(data_ptr + data_at, data.to(tl.int32, bitcast=True), mask=inside[:, None, None])
    elif data_ptr is not None:
        scale = tl.where(finite, power_of_two(exponent), float("nan"))
        data_at = (groups * 32)[:, None, None] + (tl.arange(0, 4)[:, None] * 8 + tl.arange(0, 8)[None, :])[None, :, :]
        tl.store(data_ptr + data_at, to_bfloat16(values * per_element(scale)), mask=inside[:, None, None])
    return byte
