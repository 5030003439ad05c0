"""Counter-based random bits: Philox4x32-10 (Salmon et al., SC 2011), the same on every device and in Triton.

Key = (seed, layer), counter = (block index, step, rank << 16 | micro-batch, role), all uint32, so nothing is stored
between draws and the user's own generators are not touched.
"""

from typing import cast

import torch
from torch import Tensor

from .mxfp4 import GROUP_SIZE

SIGNS_DX, SIGNS_DW, GRAD, WEIGHT_T, GRAD_T, INPUT_T = range(6)
"""Roles: what the bits are for. Signs of the two gradient GEMMs, and stochastic rounding of their four operands."""

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: tuple[Tensor | int, ...], key: tuple[Tensor | int, ...]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32 on integers or int64 tensors that hold uint32 words: four of a counter, two of a key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # A product of two uint32 wraps around in int64, but its 64 bits are right: shift and mask them out.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _KEY_STEPS[0]) & _MASK, (k1 + _KEY_STEPS[1]) & _MASK
    return cast(tuple[Tensor, ...], (c0, c1, c2, c3))


def _words(seed: Tensor, blocks: Tensor | int, role: int) -> tuple[Tensor, ...]:
    # On a CPU, Python's integers are much faster than tensors of one; from elsewhere they would have to be waited for.
    key, step, stream = seed.tolist() if seed.device.type == "cpu" else seed
    return philox4x32((blocks, step & _MASK, stream & _MASK, role), (key & _MASK, (key >> 32) & _MASK))


def make_seed(seed: int, layer: int = 0, step: int = 0, rank: int = 0, micro_batch: int = 0) -> list[int]:
    """The three words of a seed tensor: ``[layer << 32 | seed, step, rank << 16 | micro_batch]``.

    Raises:
        ValueError: If a number does not fit: seed, layer and step are uint32, rank and micro_batch uint16.
    """
    for name, value, bits in (
        ("seed", seed, 32),
        ("layer", layer, 32),
        ("step", step, 32),
        ("rank", rank, 16),
        ("micro_batch", micro_batch, 16),
    ):
        if not 0 <= value < 1 << bits:
            raise ValueError(f"The {name} of a random stream is {value}; it must be from 0 to 2**{bits} - 1.")
    key = layer << 32 | seed
    return [key - (1 << 64) if key >= 1 << 63 else key, step, rank << 16 | micro_batch]


def draw_signs(seed: Tensor, role: int) -> Tensor:
    """32 random signs, float32 [32] of +-1: bit i of word 0 of block 0. ``seed`` is int64 [3]."""
    word = _words(seed, 0, role)[0]
    bits = torch.arange(GROUP_SIZE, device=seed.device)
    return (1 - 2 * ((word >> bits) & 1)).to(torch.float32)


def random_bytes(seed: Tensor, role: int, first: int, groups: int) -> Tensor:
    """One random byte an element of groups first, first + 1, ...: uint8 [groups, 32]; two Philox blocks a group."""
    blocks = torch.arange(2 * first, 2 * (first + groups), device=seed.device)
    words = torch.stack(_words(seed, blocks, role), dim=-1)  # [2 * groups, 4] of uint32
    shifts = torch.arange(0, 32, 8, device=seed.device)
    return ((words[..., None] >> shifts) & 0xFF).to(torch.uint8).view(groups, GROUP_SIZE)
