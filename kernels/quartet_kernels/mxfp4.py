"""The MXFP4 format (OCP Microscaling Formats v1.0): E2M1 codes, groups of 32, one E8M0 power-of-two scale each."""

from dataclasses import dataclass

import torch
from torch import Tensor

GROUP_SIZE = 32
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NAN_SCALE = 255
"""The E8M0 byte of a group that held a NaN or an infinity."""


def scale_values(scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """E8M0 bytes, uint8 of any shape, as floats: ``2**(byte - 127)``, byte 255 as NaN (also byte 0: 2**-127)."""
    bits = scales.to(torch.int32) << 23
    # The bit field of 2**(byte - 127) is the byte itself, but for 0 (a subnormal) and 255 (it would read infinity).
    bits = torch.where(scales == 0, 0x00400000, torch.where(scales == NAN_SCALE, 0x7FC00000, bits))
    return bits.view(torch.float32).to(dtype)


def pack_codes(codes: Tensor) -> Tensor:
    """uint8 codes 0..15, [..., K], two to a byte, [..., K/2]; the low nibble is the even element."""
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_codes(packed: Tensor) -> Tensor:
    """The inverse of `pack_codes`: [..., K/2] to [..., K]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def unpack_mask(mask: Tensor) -> Tensor:
    """Clip mask words, int32 [..., K/32], as bool [..., K]: bit i of a word is element i of its group.

    Raises:
        TypeError: If the mask is not int32.
    """
    if mask.dtype != torch.int32:
        raise TypeError(f"A clip mask is an int32 tensor of one word a group, not {mask.dtype}.")
    bits = torch.arange(GROUP_SIZE, dtype=torch.int32, device=mask.device)
    return ((mask[..., None] >> bits) & 1).bool().flatten(-2)


def pack_mask(keep: Tensor) -> Tensor:
    """The inverse of `unpack_mask`: bool [..., K] to int32 [..., K/32]."""
    octets = keep.unflatten(-1, (-1, 8)).to(torch.uint8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=keep.device)
    octets = (octets * weights).sum(-1, dtype=torch.uint8)
    return octets.contiguous().view(torch.int32)


def decode(codes: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """``code * scale`` without any factor: uint8 [..., K/2] and [..., K/32] to [..., K]; exact in bfloat16."""
    values = torch.tensor(E2M1_VALUES + tuple(-v for v in E2M1_VALUES), dtype=torch.float32, device=codes.device)
    pairs = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=-1)  # byte -> (low, high)
    elements = torch.nn.functional.embedding(codes.to(torch.int32), pairs)  # [..., K/2, 2]
    groups = elements.flatten(-2).unflatten(-1, (-1, GROUP_SIZE))
    return (groups * scale_values(scales)[..., None]).flatten(-2).to(dtype)  # exact in float32


@dataclass(frozen=True, eq=False)
class MXFP4Tensor:
    """A tensor in MXFP4, grouped along its last axis; its value is ``code * scale * factor``.

    Args:
        codes: uint8 [..., K/2], two E2M1 codes (``sign << 3 | index``) a byte, low nibble first.
        scales: uint8 [..., K/32], E8M0.
        factor: 1 or 4/3; kept beside the scales because a power of two cannot hold it.

    Raises:
        TypeError: If codes or scales are not uint8.
        ValueError: If their shapes or devices do not belong together, or the factor is another.
    """

    codes: Tensor
    scales: Tensor
    factor: float = 1.0

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.uint8 or self.scales.dtype != torch.uint8:
            raise TypeError(f"MXFP4 codes and scales are uint8, not {self.codes.dtype} and {self.scales.dtype}.")
        expected = (*self.codes.shape[:-1], self.codes.shape[-1] * 2 // GROUP_SIZE)
        if self.codes.shape[-1] * 2 % GROUP_SIZE or tuple(self.scales.shape) != expected:
            raise ValueError(
                f"MXFP4 codes of shape {tuple(self.codes.shape)} do not go with scales of shape "
                f"{tuple(self.scales.shape)}: they are [..., K/2] and [..., K/32] with K a multiple of 32."
            )
        if self.factor not in (1.0, 4 / 3):
            raise ValueError(f"An MXFP4 factor is {self.factor!r}; it is 1 or 4/3.")
        if self.codes.device != self.scales.device:
            raise ValueError(f"MXFP4 codes are on {self.codes.device} and scales on {self.scales.device}.")

    @property
    def shape(self) -> torch.Size:
        """The logical shape [..., K]."""
        return torch.Size((*self.codes.shape[:-1], self.codes.shape[-1] * 2))

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales: 17/32 of the number of elements."""
        return self.codes.nbytes + self.scales.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """``code * scale * factor``, [..., K]; a group with scale byte 255 is NaN."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return (decode(self.codes, self.scales, wide) * self.factor).to(dtype)
