"""Random packed operands and the float64 product that every GEMM is compared with."""

from dataclasses import dataclass

import torch

from quartet_kernels.mxfp4 import decode, unpack_mask
from quartet_kernels.rotation import rotation_matrix

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-9, torch.float16: 2**-11}
"""Largest relative Frobenius error of an output dtype: rounding to nearest once, or the float32 sum."""


@dataclass
class Case:
    """One product: packed operands, an epilogue, and its float64 result (NaN where it must be)."""

    a: torch.Tensor
    a_scales: torch.Tensor
    b: torch.Tensor
    b_scales: torch.Tensor
    epilogue: dict[str, object]
    expected: torch.Tensor


def operand(
    generator: torch.Generator, rows: int, length: int, spread: int = 6, outliers: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [rows, length / 2], scales uint8 [rows, length / 32] over `spread` binades; outliers: x64."""
    device = generator.device
    codes = torch.randint(0, 256, (rows, length // 2), dtype=torch.uint8, generator=generator, device=device)
    low = 127 - spread // 2
    scales = torch.randint(low, low + spread + 1, (rows, length // 32), generator=generator, device=device)
    if outliers:
        scales += 6 * (torch.rand(scales.shape, generator=generator, device=device) < 0.02)
    return codes, scales.to(torch.uint8)


def make_case(
    generator: torch.Generator, M: int, N: int, K: int, *, out_dtype: torch.dtype, bias: bool = False,
    mask: bool = False, group: int = 0, transform: str = "hadamard", alpha: float = 1.0, spread: int = 6,
    outliers: bool = False, nan_rows: bool = False,
) -> Case:  # fmt: skip
    """A random product; nan_rows gives the last row of each operand a group of byte 255."""
    device = generator.device
    a, a_scales = operand(generator, M, K, spread, outliers)
    b, b_scales = operand(generator, N, K, spread)
    if nan_rows:
        a_scales[-1, 0] = b_scales[-1, -1] = 255
        a[-1, :16] = b[-1, -16:] = 0
    result = alpha * (decode(a, a_scales, torch.float64) @ decode(b, b_scales, torch.float64).T)
    epilogue: dict[str, object] = {"alpha": alpha, "out_dtype": out_dtype}
    if bias:
        epilogue["bias"] = torch.randn(N, generator=generator, device=device)
        result = result + epilogue["bias"]
    if mask:
        words = torch.randint(-(2**31), 2**31, (M, N // 32), generator=generator, device=device).to(torch.int32)
        epilogue["mask"] = words
        result = torch.where(unpack_mask(words), result, 0.0)
    if group:
        matrix = rotation_matrix(transform, group, device)
        epilogue["matrix"] = matrix
        result = (result.reshape(M, N // group, group) @ matrix.double().T * group**-0.5).reshape(M, N)
    return Case(a, a_scales, b, b_scales, epilogue, result)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative Frobenius error over what is finite; infinite unless the same elements are NaN."""
    if not torch.equal(actual.isnan(), expected.isnan()):
        return float("inf")
    keep = ~expected.isnan()
    expected = expected[keep]
    return ((actual[keep].double() - expected).norm() / expected.norm().clamp_min(1e-300)).item() if keep.any() else 0.0


def fp8_operand(codes: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The FP8 operand of a packed one in plain PyTorch: float8_e5m2 [rows, length], float32 [rows]."""
    finite = scales != 255
    values = decode(codes, torch.where(finite, scales, 0), torch.float64)
    used = finite & (values.unflatten(1, (-1, 32)) != 0).any(-1) if values.numel() else finite
    exponent = torch.where(used, scales.long() - 127, -1000)
    exponent = torch.cat((exponent, exponent.new_full((len(scales), 1), -1000)), 1).amax(1)
    scale = torch.where(exponent == -1000, 1.0, torch.exp2(exponent.clamp_min(-113) - 13.0))
    data = torch.where(finite.repeat_interleave(32, 1), values / scale[:, None], 0.0)
    return data.to(torch.float8_e5m2), torch.where(finite.all(1), scale, torch.nan).float()


def untile(scales: torch.Tensor, rows: int, groups: int) -> torch.Tensor:
    """The inverse of `tile_scales`, element by element: byte [row, group] of scales that may be tiled."""
    if scales.dim() == 2:
        return scales
    row, group = torch.arange(rows, device=scales.device)[:, None], torch.arange(groups, device=scales.device)[None, :]
    return scales.flatten(2)[row // 128, group // 4, row % 32 * 16 + row // 32 % 4 * 4 + group % 4]
