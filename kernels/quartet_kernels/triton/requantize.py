"""Packed codes [M, K] to the quantised operand of the transposed tensor, [K, M], never in high precision in memory.

    v = (x D) H 32^-1/2 along the columns of x = code * scale (exact in bfloat16), abs-max scale; no factor is read or applied.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rotation import BACKWARD_GROUP_SIZE, rotation_matrix
from .common import INTERPRET, to_bfloat16, values_of
from .quantize import (
    NUM_WARPS,
    TRANSPOSED_FEATURES,
    TRANSPOSED_TOKENS,
    Operand,
    _factor,
    empty_operand,
    finish_operand,
    quantize_transposed_tile,
    words,
)


@triton.jit(do_not_specialize=["n_tokens"])
def requantize_kernel(
    in_codes_ptr, in_scales_ptr, matrix_ptr, signs_ptr, seed_ptr, codes_ptr, scales_ptr, data_ptr, n_tokens, n_features,
    factor, STOCHASTIC: tl.constexpr, ROLE: tl.constexpr, SIGN_ROLE: tl.constexpr,
    TOKENS: tl.constexpr, FEATURES: tl.constexpr,
):  # fmt: skip
    """One tile of the packed tensor [n_tokens, n_features], quantised along its columns."""
    tiles = tl.cdiv(n_features, FEATURES)
    first_token = tl.program_id(0) // tiles * TOKENS
    first_feature = tl.program_id(0) % tiles * FEATURES
    token = first_token + tl.arange(0, TOKENS)
    inside = token < n_tokens
    pair = first_feature // 2 + tl.arange(0, FEATURES // 2)
    group = first_feature // 32 + tl.arange(0, FEATURES // 32)
    codes_at = token.to(tl.int64)[:, None] * (n_features // 2) + pair[None, :]
    codes = tl.load(in_codes_ptr + codes_at, mask=inside[:, None] & (pair < n_features // 2)[None, :], other=0)
    scales_at = token.to(tl.int64)[:, None] * (n_features // 32) + group[None, :]
    byte = tl.load(in_scales_ptr + scales_at, mask=inside[:, None] & (group < n_features // 32)[None, :], other=0)

    # 2^(byte - 127): byte 0 is a subnormal, 255 a NaN.
    byte = byte.to(tl.uint32)
    scale = tl.where(byte == 0, 0x00400000, tl.where(byte == 255, 0x7FC00000, byte << 23)).to(tl.float32, bitcast=True)
    scale = tl.broadcast_to(scale[:, :, None], (TOKENS, FEATURES // 32, 16)).reshape(TOKENS, FEATURES // 2)
    codes = codes.to(tl.uint32)
    low = values_of(codes & 7) * scale
    high = values_of((codes >> 4) & 7) * scale
    low = (low.to(tl.uint32, bitcast=True) ^ ((codes & 8) << 28)).to(tl.float32, bitcast=True)
    high = (high.to(tl.uint32, bitcast=True) ^ ((codes & 0x80) << 24)).to(tl.float32, bitcast=True)
    x = tl.join(to_bfloat16(low), to_bfloat16(high)).reshape(TOKENS, FEATURES)
    quantize_transposed_tile(
        x, first_token, first_feature, n_tokens, n_features, matrix_ptr, signs_ptr, seed_ptr, codes_ptr, scales_ptr,
        data_ptr, factor, STOCHASTIC, ROLE, SIGN_ROLE,
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
    uint8 [M, K/2] and scales uint8 [M, K/32]; signs, rounding and operand as in :func:`.quantize.quantize_backward`."""
    rows, columns = codes.shape[0], codes.shape[1] * 2
    new_codes, new_scales, data = empty_operand(columns, triton.cdiv(rows, 32) * 32, operand, codes.device)
    stochastic = rounding == "stochastic"
    if codes.numel() > 0:
        tiles = triton.cdiv(rows, TRANSPOSED_TOKENS) * triton.cdiv(columns, TRANSPOSED_FEATURES)
        requantize_kernel[(tiles,)](
            codes.contiguous(), scales.contiguous(),
            rotation_matrix("hadamard", BACKWARD_GROUP_SIZE, codes.device, torch.bfloat16), signs, seed,
            words(new_codes), new_scales, data, rows, columns, _factor(BACKWARD_GROUP_SIZE),
            STOCHASTIC=stochastic, ROLE=role if stochastic else 0, SIGN_ROLE=sign_role if signs is None else None,
            TOKENS=TRANSPOSED_TOKENS, FEATURES=TRANSPOSED_FEATURES, num_warps=NUM_WARPS,
        )  # fmt: skip
    return finish_operand(new_codes, new_scales, data, operand)
