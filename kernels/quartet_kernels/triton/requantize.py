"""Packed codes [M, K] to the quantised operand of the transposed tensor, [K, M], never in high precision in memory.

v = (x D) H 32^-1/2 along the columns of x = code * scale (exact in bfloat16), abs-max scale; no factors
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rotation import BACKWARD_GROUP_SIZE, rotation_matrix
from .common import PORTABLE, load_rotation, rotate, row_key, row_scale_of, row_top, to_bfloat16
from .launch import cdiv, is_hopper, launch, multiprocessors
from .quantize import (
    FEATURES_PER_TILE,
    NUM_WARPS,
    TOKENS_PER_TILE,
    TRANSPOSED_STAGES,
    Operand,
    empty_fp8,
    empty_operand,
    finish_operand,
    inverse_root,
    programs,
    quantize_transposed,
    scale_pointers,
    words,
)

PROGRAMS = 24  # a multiprocessor
FP8_PROGRAMS = 16
CHECKING_PROGRAMS = 2
FP8_REGISTERS = 80
"""On Hopper, rounding to nearest: six programs a multiprocessor instead of four, for two words that are spilled."""
SAMPLES = tl.constexpr(16)  # tokens
HEADROOM = tl.constexpr(10)  # binades between a sample's largest scale and the row's; 18 are left below


@triton.jit
def decode_pairs(codes, scale):
    """bfloat16 [..., 2]: code * scale of the two codes in each byte; bytes as uint32, scale as bfloat16 bits twice."""
    # Indices as leading bits are 2^-126 times the numbers, .5 a subnormal; both of a byte at once.
    pairs = ((codes * (4097 << 6)) & 0x01C001C0) | ((codes * (4097 << 12)) & 0x80008000)
    if PORTABLE:
        scale = (scale << 16).to(tl.float32, bitcast=True)
        low = to_bfloat16((pairs << 16).to(tl.float32, bitcast=True) * 8.507059173023462e37 * scale)
        high = to_bfloat16((pairs & 0xFFFF0000).to(tl.float32, bitcast=True) * 8.507059173023462e37 * scale)
    else:  # products plus -0, since sm_80 has no product alone
        pairs = tl.inline_asm_elementwise(
            "{.reg .b32 power, none; mov.b32 power, 0x7E807E80; mov.b32 none, 0x80008000;"
            " fma.rn.bf16x2 $0, $1, power, none; fma.rn.bf16x2 $0, $0, $2, none;}",
            "=&r,r,r", [pairs, scale], dtype=tl.uint32, is_pure=True, pack=1,
        )  # fmt: skip
        low = pairs.to(tl.uint16).to(tl.bfloat16, bitcast=True)
        high = (pairs >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.join(low, high)


@triton.jit
def rotated_codes(
    codes_ptr, scales_ptr, first_token, first_feature, n_tokens, n_features, matrix, factor, FEATURES: tl.constexpr
):
    """v [FEATURES, 4, 8] of 32 tokens, read along rows: the product takes its operand transposed."""
    token = first_token + tl.arange(0, 32)
    inside = (token < n_tokens)[:, None]
    pair = (first_feature // 2 + tl.arange(0, FEATURES // 2))[None, :]
    group = (first_feature // 32 + tl.arange(0, FEATURES // 32))[None, :]
    codes_at = token.to(tl.int64)[:, None] * (n_features // 2) + pair
    codes = tl.load(codes_ptr + codes_at, mask=inside & (pair < n_features // 2), other=0).to(tl.uint32)
    scales_at = token.to(tl.int64)[:, None] * (n_features // 32) + group
    byte = tl.load(scales_ptr + scales_at, mask=inside & (group < n_features // 32), other=0).to(tl.uint32)

    # 2^(byte - 127): byte 0 is a subnormal, 255 a NaN.
    scale = tl.where(byte == 0, 0x0040, tl.where(byte == 255, 0x7FC0, byte << 7)) * 0x00010001
    scale = tl.broadcast_to(scale[:, :, None], (32, FEATURES // 32, 16)).reshape(32, FEATURES // 2)
    return rotate(tl.trans(decode_pairs(codes, scale).reshape(32, FEATURES)), matrix, factor)


@triton.jit
def guessed_top(scales_ptr, first_feature, n_tokens, n_features, FEATURES: tl.constexpr):
    """Row exponents, + 127, [FEATURES] of the columns of packed codes, HEADROOM binades above the scales of a few
    tokens that are spread over all; of a power of two, at no power of two from each other, as sequences are."""
    token = (tl.arange(0, SAMPLES) + 1) * (n_tokens // (SAMPLES + 1))
    group = first_feature // 32 + tl.arange(0, FEATURES // 32)
    scales_at = token.to(tl.int64)[:, None] * (n_features // 32) + group[None, :]
    byte = tl.load(scales_ptr + scales_at, mask=(group < n_features // 32)[None, :], other=0).to(tl.int32)
    top = tl.minimum(tl.maximum(tl.max(byte, axis=0) + HEADROOM, row_top(0)), 254)
    return tl.broadcast_to(top[:, None], (FEATURES // 32, 32)).reshape(FEATURES)


@triton.jit
def store_extent(extent_ptr, byte, first_token, first_feature, n_features):
    """What `checked_top` reads of the scale bytes [features, 4] of a tile: in int32 [tiles of four groups, n_features],
    256 times the largest `row_key` plus the complement of the smallest byte but 0."""
    largest = tl.max(row_key(byte, byte != 0), axis=1)
    spread = tl.max(tl.where(byte == 0, 0, 255 - byte), axis=1)
    feature = first_feature + tl.arange(0, byte.shape[0])
    extent_at = (first_token // 128).to(tl.int64) * n_features + feature
    tl.store(extent_ptr + extent_at, largest * 256 + spread, mask=feature < n_features)


@triton.jit
def checked_top(extent_ptr, row_scale_ptr, first_feature, n_tokens, n_features, guess):
    """The exact row exponents, + 127, of operand rows [features], and whether FP8 numbers relative to `guess` are
    exact: no group lies above it, or more than 28 binades below. The first programs write the row scales."""
    FEATURES: tl.constexpr = guess.shape[0]
    feature = first_feature + tl.arange(0, FEATURES)
    largest = tl.zeros((FEATURES,), tl.int32)
    spread = tl.zeros((FEATURES,), tl.int32)
    tiles = tl.cdiv(n_tokens, 128)
    for start in range(0, tiles, 64):
        tile = start + tl.arange(0, 64)
        at = tile.to(tl.int64)[:, None] * n_features + feature[None, :]
        extent = tl.load(extent_ptr + at, mask=(tile < tiles)[:, None] & (feature < n_features)[None, :], other=0)
        largest = tl.maximum(largest, tl.max(extent // 256, axis=0))
        spread = tl.maximum(spread, tl.max(extent % 256, axis=0))
    fits = (largest - 1 <= guess) & (255 - spread >= guess - 28)
    exact = tl.min(fits.to(tl.int32), axis=0) != 0
    if first_feature == tl.program_id(0) * FEATURES:
        key = tl.where(exact & (largest != 0), guess + 1, largest)
        tl.store(row_scale_ptr + feature, row_scale_of(key), mask=feature < n_features)
    return row_top(largest), exact


@triton.jit(do_not_specialize=["n_tokens"])
def requantize_kernel(
    in_codes_ptr, in_scales_ptr, matrix_ptr, signs_ptr, seed_ptr, codes_ptr, scales_ptr, data_ptr, row_scale_ptr,
    extent_ptr, tiled_ptr, n_tokens, n_features, factor, STOCHASTIC: tl.constexpr, ROLE: tl.constexpr,
    SIGN_ROLE: tl.constexpr, FEATURES: tl.constexpr, STAGES: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Tiles of 128 tokens of the packed tensor [n_tokens, n_features], quantised along its columns.

    With `row_scale_ptr`, as FP8 relative to row exponents that are guessed, since no program sees a whole column; then
    the number of programs is a multiple of that of tiles beside each other. A second launch, with CHECK, reads what the
    first has seen (`extent_ptr`), writes row scales, and quantises again where a guess was wrong."""
    matrix = load_rotation(matrix_ptr, signs_ptr, seed_ptr, SIGN_ROLE, 32, tl.bfloat16)
    tiles = tl.cdiv(n_features, FEATURES)
    end = tl.cdiv(n_tokens, 128) * tiles
    top = None
    if row_scale_ptr is not None:
        first_feature = tl.program_id(0) % tiles * FEATURES
        top = guessed_top(in_scales_ptr, first_feature, n_tokens, n_features, FEATURES)
        if CHECK:
            top, exact = checked_top(extent_ptr, row_scale_ptr, first_feature, n_tokens, n_features, top)
            end = tl.where(exact, 0, end)
    for tile in tl.range(tl.program_id(0), end, tl.num_programs(0), num_stages=STAGES):
        token = tile // tiles * 128
        feature = tile % tiles * FEATURES
        v0 = rotated_codes(in_codes_ptr, in_scales_ptr, token, feature, n_tokens, n_features, matrix, factor, FEATURES)
        v1 = rotated_codes(
            in_codes_ptr, in_scales_ptr, token + 32, feature, n_tokens, n_features, matrix, factor, FEATURES
        )
        v2 = rotated_codes(
            in_codes_ptr, in_scales_ptr, token + 64, feature, n_tokens, n_features, matrix, factor, FEATURES
        )
        v3 = rotated_codes(
            in_codes_ptr, in_scales_ptr, token + 96, feature, n_tokens, n_features, matrix, factor, FEATURES
        )
        byte = quantize_transposed(
            v0, v1, v2, v3, token, feature, n_tokens, n_features, seed_ptr, codes_ptr, scales_ptr, data_ptr,
            STOCHASTIC, ROLE, tiled_ptr, top,
        )  # fmt: skip
        if extent_ptr is not None and not CHECK:
            store_extent(extent_ptr, byte, token, feature, n_features)


def requantize(
    codes: Tensor,
    scales: Tensor,
    *,
    signs: Tensor | None = None,
    sign_role: int | None = None,
    seed: Tensor | None = None,
    role: int = 0,
    rounding: str = "nearest",
    operand: str = "packed",
) -> Operand:
    """The operand of the transposed tensor, [K, M] grouped along M (padded with zeros to a multiple of 32), from codes
    uint8 [M, K/2] and scales uint8 [M, K/32]; signs, rounding and operand as in `quantize.quantize_backward`. Of an FP8
    operand, only the products of numbers and row scales are those of `expand.expand`."""
    rows, columns = codes.shape[0], codes.shape[1] * 2
    device = codes.device
    stochastic = rounding == "stochastic"
    matrix = rotation_matrix("hadamard", BACKWARD_GROUP_SIZE, device, torch.bfloat16)
    source = (codes.contiguous(), scales.contiguous(), matrix, signs, seed)
    sizes = (rows, columns, inverse_root(BACKWARD_GROUP_SIZE))
    rounding_constants = (stochastic, role if stochastic else 0, sign_role if signs is None else None)
    constants = (*rounding_constants, FEATURES_PER_TILE, TRANSPOSED_STAGES)
    tiles, strips = cdiv(rows, TOKENS_PER_TILE), cdiv(columns, FEATURES_PER_TILE)
    if operand == "fp8":
        fp8, row_scale = empty_fp8(columns, cdiv(rows, 32) * 32, device)
        if tiles == 0:
            return fp8.view(torch.float8_e5m2), row_scale.fill_(1.0)
        extent = torch.empty(tiles, columns, dtype=torch.int32, device=device)
        for check in (False, True):
            per_multiprocessor = CHECKING_PROGRAMS if check else FP8_PROGRAMS
            parts = min(tiles, cdiv(per_multiprocessor * multiprocessors(device), strips))
            launch(
                requantize_kernel,
                device,
                strips * parts,
                (*source, None, None, fp8, row_scale, extent, None, *sizes),
                (*constants, check),
                NUM_WARPS,
                registers=FP8_REGISTERS if is_hopper(device) and not (check or stochastic) else None,
            )
        return fp8.view(torch.float8_e5m2), row_scale
    new_codes, new_scales, data = empty_operand(columns, cdiv(rows, 32) * 32, operand, device)
    if tiles * strips > 0:
        plain, tiled = scale_pointers(new_scales)
        launch(
            requantize_kernel,
            device,
            programs(tiles * strips, device, PROGRAMS),
            (*source, words(new_codes), plain, data, None, None, tiled, *sizes),
            (*constants, False),
            NUM_WARPS,
        )
    return finish_operand(new_codes, new_scales, data, operand)
