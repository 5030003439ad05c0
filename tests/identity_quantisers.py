"""The reference without its quantisers: rotations, signs, transposes, masks and factors must cancel exactly."""

import pytest
import torch
from torch import Tensor

from quartet_kernels import QuartetConfig, reference
from quartet_kernels.ops import BACKWARD_FACTOR, forward_factor


def take_out_quantisers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let "codes" of the reference backend stand for the exact values of what was quantised."""
    saved: dict[int, tuple[Tensor, Tensor]] = {}

    def exact(v: Tensor, factor: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        finite = torch.ones(v.shape[:-1], dtype=torch.bool)
        return v / factor, v * 0, torch.zeros_like(finite, dtype=torch.int32), ~finite, finite

    def forward(v: Tensor, config: QuartetConfig) -> tuple[Tensor, ...]:
        return exact(v, forward_factor(config))

    def backward(v: Tensor, random: Tensor | None) -> tuple[Tensor, ...]:
        return exact(v, BACKWARD_FACTOR)

    def pack(q: Tensor, u: Tensor, exponent: Tensor, zero: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
        codes = torch.empty(*q.shape[:-2], q.shape[-2] * 16, dtype=torch.uint8)
        saved[codes.data_ptr()] = (codes, q.flatten(-2))
        return codes, torch.empty(q.shape[:-1], dtype=torch.uint8)

    def mxfp8(x: Tensor, transpose: bool) -> tuple[Tensor, None]:
        x = x.t() if transpose else x
        return torch.nn.functional.pad(x, (0, -x.shape[1] % 32)), None

    monkeypatch.setattr(reference, "_project", forward)
    monkeypatch.setattr(reference, "_quantize_abs_max", backward)
    monkeypatch.setattr(reference, "quantize_mxfp8", mxfp8)
    monkeypatch.setattr(reference, "_pack", pack)
    monkeypatch.setattr(reference, "decode", lambda codes, scales, dtype: saved[codes.data_ptr()][1].to(dtype))
