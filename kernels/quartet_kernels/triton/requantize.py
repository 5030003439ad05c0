"""Packed codes [M, K] to the quantised operand of the transposed tensor, [K, M], never in high precision in memory.

v = (x D) H 32^-1/2 along the columns of x = code * scale (exact in bfloat16), abs-max scale; no factors
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rotation import BACKWARD_GROUP_SIZE, rotation_matrix
from .common import PORTABLE, load_rotation, rotate, to_bfloat16
from .launch import cdiv, launch
from .quantize import (
    FEATURES_PER_TILE,
    NUM_WARPS,
    TOKENS_PER_TILE,
    TRANSPOSED_STAGES,
    Operand,
    empty_operand,
    finish_operand,
    inverse_root,
    programs,
    quantize_transposed,
    scale_pointers,
    words,
)

PROGRAMS = 24  # a multiprocessor


@triton.jit
def decode_pairs(codes, scale):
    """bfloat16 [..., 2]: code * scale of the two codes in each byte; bytes and bfloat16 bits of scales as uint32."""
    # Indices as leading bits are 2^-126 times the numbers, .5 a subnormal; both of a byte at once.
    pairs = ((codes * (4097 << 6)) & 0x01C001C0) | ((codes * (4097 << 12)) & 0x80008000)
    if PORTABLE:
        scale = (scale << 16).to(tl.float32, bitcast=True)
        low = to_bfloat16((pairs << 16).to(tl.float32, bitcast=True) * 8.507059173023462e37 * scale)
        high = to_bfloat16((pairs & 0xFFFF0000).to(tl.float32, bitcast=True) * 8.507059173023462e37 * scale)
    else:  # products plus -0, since sm_80 has no product alone
        pairs = tl.inline_asm_elementwise(
            "{.reg .b32 scale, power, none; mov.b32 power, 0x7E807E80; prmt.b32 scale, $2, $2, 0x1010;"
            " mov.b32 none, 0x80008000; fma.rn.bf16x2 $0, $1, power, none; fma.rn.bf16x2 $0, $0, scale, none;}",
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
    scale = tl.where(byte == 0, 0x0040, tl.where(byte == 255, 0x7FC0, byte << 7))[:, :, None]
    scale = tl.broadcast_to(scale, (32, FEATURES // 32, 16)).reshape(32, FEATURES // 2)
    return rotate(tl.trans(decode_pairs(codes, scale).reshape(32, FEATURES)), matrix, factor)


@triton.jit(do_not_specialize=["n_tokens"])
def requantize_kernel(
    in_codes_ptr, in_scales_ptr, matrix_ptr, signs_ptr, seed_ptr, codes_ptr, scales_ptr, data_ptr, n_tokens, n_features,
    factor, tiled_ptr, STOCHASTIC: tl.constexpr, ROLE: tl.constexpr, SIGN_ROLE: tl.constexpr,
    FEATURES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tiles of 128 tokens of the packed tensor [n_tokens, n_features], quantised along its columns."""
    matrix = load_rotation(matrix_ptr, signs_ptr, seed_ptr, SIGN_ROLE, 32, tl.bfloat16)
    tiles = tl.cdiv(n_features, FEATURES)
    for tile in tl.range(tl.program_id(0), tl.cdiv(n_tokens, 128) * tiles, tl.num_programs(0), num_stages=STAGES):
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
        quantize_transposed(
            v0, v1, v2, v3, token, feature, n_tokens, n_features, seed_ptr, codes_ptr, scales_ptr, data_ptr,
            STOCHASTIC, ROLE, tiled_ptr,
        )  # fmt: skip


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
    uint8 [M, K/2] and scales uint8 [M, K/32]; signs, rounding and operand as in `quantize.quantize_backward`."""
    rows, columns = codes.shape[0], codes.shape[1] * 2
    new_codes, new_scales, data = empty_operand(columns, cdiv(rows, 32) * 32, operand, codes.device)
    stochastic = rounding == "stochastic"
    if codes.numel() > 0:
        matrix = rotation_matrix("hadamard", BACKWARD_GROUP_SIZE, codes.device, torch.bfloat16)
        plain, tiled = scale_pointers(new_scales)
        launch(
            requantize_kernel,
            codes.device,
            programs(cdiv(rows, TOKENS_PER_TILE) * cdiv(columns, FEATURES_PER_TILE), codes.device, PROGRAMS),
            (codes.contiguous(), scales.contiguous(), matrix, signs, seed, words(new_codes), plain, data)
            + (rows, columns, inverse_root(BACKWARD_GROUP_SIZE), tiled),
            (stochastic, role if stochastic else 0, sign_role if signs is None else None)
            + (FEATURES_PER_TILE, TRANSPOSED_STAGES),
            NUM_WARPS,
        )
    return finish_operand(new_codes, new_scales, data, operand)
