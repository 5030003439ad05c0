"""The Triton backends as sets of functions: they differ in the operands that their GEMM reads."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import Backend
from ..reference import Operand
from . import fp8_matmul, matmul, native_matmul
from .common import tile_scales, tiled_shape, tiles_scales
from .expand import expand as expand_fp8
from .mxfp8 import quantize_mxfp8
from .quantize import quantize_backward, quantize_forward
from .requantize import requantize

FAST_ACCUMULATION = 16384
"""Longest sum of rotated operands for which "auto" takes fast FP8 accumulation; what it costs is in BENCHMARKS.md."""


def make_backend(name: str) -> Backend:
    """``native`` and ``triton`` multiply packed operands, ``fp8`` and ``bf16`` exact copies in those formats."""
    multiply: Callable[..., Tensor]
    if name in ("native", "triton"):
        operand, expand, empty_operand = "packed", _expand_packed, _empty_packed
        multiply = functools.partial(_matmul_packed, matmul.matmul)
        if name == "native":
            operand, expand, empty_operand = "native", _expand_native, _empty_native
            multiply = functools.partial(_matmul_packed, native_matmul.matmul)
    elif name == "fp8":
        operand, expand, empty_operand, multiply = "fp8", _expand_fp8, _empty_fp8, _matmul_fp8
    else:
        operand, expand, empty_operand, multiply = "bf16", _expand_bf16, _empty_bf16, _matmul_dense
    return Backend(
        name=name,
        quantize_forward=functools.partial(quantize_forward, operand=operand),
        quantize_backward=functools.partial(quantize_backward, operand=operand),
        requantize=functools.partial(_requantize, operand=operand),
        expand=expand,
        matmul=multiply,
        matmul_bf16=matmul_bf16,
        matmul_mxfp8=functools.partial(matmul_mxfp8, native=name == "native"),
        unrotate=matmul.unrotate,
        empty_operand=empty_operand,
        packed=operand in ("packed", "native"),
    )


def _requantize(codes: Tensor, scales: Tensor, *, dtype: torch.dtype = torch.float32, **options: Any) -> Operand:
    return requantize(codes, scales, **options)


def _empty_packed(x: Tensor, rows: int, columns: int) -> Operand:
    return x.new_empty(rows, columns // 2, dtype=torch.uint8), x.new_empty(rows, columns // 32, dtype=torch.uint8)


def _empty_native(x: Tensor, rows: int, columns: int) -> Operand:
    if not tiles_scales(x.device):
        return _empty_packed(x, rows, columns)
    # Of the shape only: the fill of `empty_tiled` is no part of a fake.
    scales = x.new_empty(tiled_shape(rows, columns // 32), dtype=torch.uint8)
    return x.new_empty(rows, columns // 2, dtype=torch.uint8), scales


def _empty_fp8(x: Tensor, rows: int, columns: int) -> Operand:
    return x.new_empty(rows, columns, dtype=torch.float8_e5m2), x.new_empty(rows, dtype=torch.float32)


def _empty_bf16(x: Tensor, rows: int, columns: int) -> Operand:
    return x.new_empty(rows, columns, dtype=torch.bfloat16), x.new_empty(0, dtype=torch.float32)


def _expand_packed(codes: Tensor, scales: Tensor, *, dtype: torch.dtype = torch.float32) -> Operand:
    return codes, scales


def _expand_native(codes: Tensor, scales: Tensor, *, dtype: torch.dtype = torch.float32) -> Operand:
    return codes, tile_scales(scales) if tiles_scales(codes.device) else scales


def _expand_fp8(codes: Tensor, scales: Tensor, *, dtype: torch.dtype = torch.float32) -> Operand:
    return expand_fp8(codes, scales)


def _expand_bf16(codes: Tensor, scales: Tensor, *, dtype: torch.dtype = torch.float32) -> Operand:
    data = matmul.dequantize(codes, scales, dtype=torch.bfloat16)
    return data, data.new_empty(0, dtype=torch.float32)


def _matmul_packed(
    product: Callable[..., Tensor], *operands: Tensor, accumulation: str = "auto", **epilogue: Any
) -> Tensor:
    return product(*operands, **epilogue)


def _matmul_fp8(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, *, accumulation: str = "auto", **epilogue: Any
) -> Tensor:
    if accumulation == "auto":
        accumulation = "fast" if a.shape[1] <= FAST_ACCUMULATION else "precise"
    return fp8_matmul.matmul(a, a_scale, b, b_scale, accumulation=accumulation, **epilogue)


def _dense_product(a: Tensor, b: Tensor) -> Tensor:
    """float32 a @ b of bfloat16 matrices."""
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.to(torch.float32) @ b.to(torch.float32)  # the interpreter's tensors are on the CPU


def _matmul_dense(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    *,
    alpha: float,
    bias: Tensor | None,
    mask: Tensor | None,
    matrix: Tensor | None,
    out_dtype: torch.dtype,
    accumulation: str = "auto",
) -> Tensor:
    exact_bias = bias is None or bias.dtype == out_dtype
    if mask is None and matrix is None and alpha == 1 and out_dtype == torch.bfloat16 and a.is_cuda and exact_bias:
        # cuBLAS rounds its float32 accumulator once, after the bias.
        return a @ b.t() if bias is None else torch.addmm(bias, a, b.t())
    product = _dense_product(a, b.t())
    if bias is not None:
        return (product * alpha + bias.to(torch.float32)).to(out_dtype)
    return matmul.unrotate(product, alpha=alpha, mask=mask, matrix=matrix, out_dtype=out_dtype)


def matmul_bf16(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    *,
    transpose: bool,
    alpha: float,
    mask: Tensor | None,
    matrix: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """See `quartet_kernels.reference.matmul_bf16`; cuBLAS multiplies."""
    x = x.to(torch.bfloat16)
    product = _dense_product(x.t() if transpose else x, matmul.dequantize(codes, scales, dtype=torch.bfloat16))
    return matmul.unrotate(product, alpha=alpha, mask=mask, matrix=matrix, out_dtype=out_dtype)


def matmul_mxfp8(x: Tensor, codes: Tensor, scales: Tensor, *, transpose: bool, native: bool, **epilogue: Any) -> Tensor:
    """See `quartet_kernels.reference.matmul_mxfp8`; exact bfloat16 operands where there are no MXFP8 units."""
    a = quantize_mxfp8(x, transpose=transpose, native=native)
    b = quantize_mxfp8(codes, scales, transpose=True, native=native)
    multiply = native_matmul.matmul if native else _matmul_dense
    return multiply(*a, *b, bias=None, **epilogue)
