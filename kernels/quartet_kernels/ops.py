"""The only door from Python into a backend: custom operators, opaque to ``torch.compile``, with fake kernels.

Each resolves its backend by name from its input's device; shapes and meanings are those of
:mod:`quartet_kernels.reference`. A missing mask or operand is an empty tensor of one dimension, since an operator
cannot return None.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .backends import Backend, select_backend
from .config import QuartetConfig
from .mxfp4 import GROUP_SIZE
from .rotation import rotation_matrix

_LIBRARY = torch.library.Library("quartet", "DEF")


def _operator(function: Callable[..., Any]) -> torch._ops.OpOverload:
    """Make a function the operator ``quartet::name``.

    Not ``torch.library.custom_op``, whose wrapper takes the host several times as long per call (40 microseconds
    against 6 on a loaded CPU): a layer makes nine calls, and has its own autograd function above them.
    """
    name = function.__name__
    schema = torch.library.infer_schema(function, mutates_args=())
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    return getattr(torch.ops.quartet, name).default


def _backend(name: str, x: Tensor) -> Backend:
    return select_backend(name, x.device, x.dtype)


@functools.lru_cache(maxsize=64)
def _projection(
    forward_method: str, statistic: str, scale_rule: str, transform_init: str, group_size: int
) -> QuartetConfig:
    return QuartetConfig.from_dict(
        {
            "forward_method": forward_method,
            "statistic": statistic,
            "scale_rule": scale_rule,
            "transform_init": transform_init,
            "hadamard_group_size": group_size,
        }
    )


def _no_autocast(x: Tensor) -> torch.autocast:
    # Autocast would turn the reference's float32 products into bfloat16 ones.
    return torch.autocast(x.device.type, enabled=False)


def _padded(tokens: int) -> int:
    return (tokens + GROUP_SIZE - 1) // GROUP_SIZE * GROUP_SIZE


def _none(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(0, dtype=dtype)


@_operator
def quantize_forward(
    x: Tensor,
    forward_method: str,
    statistic: str,
    scale_rule: str,
    transform_init: str,
    group_size: int,
    mask: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    config = _projection(forward_method, statistic, scale_rule, transform_init, group_size)
    with _no_autocast(x):
        codes, scales, words, data, scale = _backend(backend, x).quantize_forward(x, config=config, mask=mask)
    return (
        codes,
        scales,
        _none(x, torch.int32) if words is None else words,
        _none(x, torch.uint8) if data is None else data,
        _none(x, torch.uint8) if scale is None else scale,
    )


@torch.library.register_fake("quartet::quantize_forward", lib=_LIBRARY)
def _(
    x: Tensor,
    forward_method: str,
    statistic: str,
    scale_rule: str,
    transform_init: str,
    group_size: int,
    mask: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, columns = x.shape
    chosen = _backend(backend, x)
    if chosen.packed:
        data, scale = _none(x, torch.uint8), _none(x, torch.uint8)
    else:
        data, scale = chosen.empty_operand(x, rows, columns)
    words = x.new_empty(rows, columns // GROUP_SIZE, dtype=torch.int32) if mask else _none(x, torch.int32)
    codes = x.new_empty(rows, columns // 2, dtype=torch.uint8)
    return codes, x.new_empty(rows, columns // GROUP_SIZE, dtype=torch.uint8), words, data, scale


@_operator
def quantize_backward(
    x: Tensor,
    signs: Tensor | None,
    sign_role: int | None,
    seed: Tensor | None,
    role: int,
    rounding: str,
    transpose: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    with _no_autocast(x):
        return _backend(backend, x).quantize_backward(
            x, signs=signs, sign_role=sign_role, seed=seed, role=role, rounding=rounding, transpose=transpose
        )


@torch.library.register_fake("quartet::quantize_backward", lib=_LIBRARY)
def _(
    x: Tensor,
    signs: Tensor | None,
    sign_role: int | None,
    seed: Tensor | None,
    role: int,
    rounding: str,
    transpose: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    if transpose:
        rows, columns = columns, _padded(rows)
    return _backend(backend, x).empty_operand(x, rows, columns)


@_operator
def requantize(
    codes: Tensor,
    scales: Tensor,
    signs: Tensor | None,
    sign_role: int | None,
    seed: Tensor | None,
    role: int,
    rounding: str,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    chosen = select_backend(backend, codes.device, dtype)
    with _no_autocast(codes):
        return chosen.requantize(
            codes, scales, signs=signs, sign_role=sign_role, seed=seed, role=role, rounding=rounding, dtype=dtype
        )


@torch.library.register_fake("quartet::requantize", lib=_LIBRARY)
def _(
    codes: Tensor,
    scales: Tensor,
    signs: Tensor | None,
    sign_role: int | None,
    seed: Tensor | None,
    role: int,
    rounding: str,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    chosen = select_backend(backend, codes.device, dtype)
    return chosen.empty_operand(codes.new_empty(0, dtype=dtype), codes.shape[1] * 2, _padded(codes.shape[0]))


@_operator
def expand(codes: Tensor, scales: Tensor, dtype: torch.dtype, backend: str) -> tuple[Tensor, Tensor]:
    chosen = select_backend(backend, codes.device, dtype)
    if chosen.packed:
        return _none(codes, torch.uint8), _none(codes, torch.uint8)
    return chosen.expand(codes, scales, dtype=dtype)


@torch.library.register_fake("quartet::expand", lib=_LIBRARY)
def _(codes: Tensor, scales: Tensor, dtype: torch.dtype, backend: str) -> tuple[Tensor, Tensor]:
    chosen = select_backend(backend, codes.device, dtype)
    if chosen.packed:
        return _none(codes, torch.uint8), _none(codes, torch.uint8)
    return chosen.empty_operand(codes.new_empty(0, dtype=dtype), codes.shape[0], codes.shape[1] * 2)


@_operator
def matmul(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    alpha: float,
    bias: Tensor | None,
    mask: Tensor | None,
    transform_init: str,
    group_size: int,
    out_dtype: torch.dtype,
    accumulation: str,
    backend: str,
) -> Tensor:
    matrix = rotation_matrix(transform_init, group_size, a.device)
    with _no_autocast(a):
        return select_backend(backend, a.device, out_dtype).matmul(
            a,
            a_scale,
            b,
            b_scale,
            alpha=alpha,
            bias=bias,
            mask=mask,
            matrix=matrix,
            out_dtype=out_dtype,
            accumulation=accumulation,
        )


@torch.library.register_fake("quartet::matmul", lib=_LIBRARY)
def _(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    alpha: float,
    bias: Tensor | None,
    mask: Tensor | None,
    transform_init: str,
    group_size: int,
    out_dtype: torch.dtype,
    accumulation: str,
    backend: str,
) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=out_dtype)


@_operator
def decode_matmul(
    x: Tensor, codes: Tensor, scales: Tensor, alpha: float, bias: Tensor | None, out_dtype: torch.dtype
) -> Tensor:
    from .triton.decode import decode_matmul as multiply

    return multiply(x, codes, scales, alpha=alpha, bias=bias, out_dtype=out_dtype)


@torch.library.register_fake("quartet::decode_matmul", lib=_LIBRARY)
def _(x: Tensor, codes: Tensor, scales: Tensor, alpha: float, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0], dtype=out_dtype)


@_operator
def matmul_gradient(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    backward_dtype: str,
    transpose: bool,
    alpha: float,
    mask: Tensor | None,
    transform_init: str,
    group_size: int,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    matrix = rotation_matrix(transform_init, group_size, x.device)
    chosen = _backend(backend, x)
    multiply = chosen.matmul_mxfp8 if backward_dtype == "mxfp8" else chosen.matmul_bf16
    with _no_autocast(x):
        return multiply(
            x, codes, scales, transpose=transpose, alpha=alpha, mask=mask, matrix=matrix, out_dtype=out_dtype
        )


@torch.library.register_fake("quartet::matmul_gradient", lib=_LIBRARY)
def _(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    backward_dtype: str,
    transpose: bool,
    alpha: float,
    mask: Tensor | None,
    transform_init: str,
    group_size: int,
    out_dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return x.new_empty(x.shape[1] if transpose else x.shape[0], codes.shape[1] * 2, dtype=out_dtype)


# For torch's FlopCounterMode, and so for Lightning's ModelSummary and ThroughputMonitor: the operations of a product,
# whatever the precision, as for torch.mm.


@register_flop_formula(torch.ops.quartet.matmul, get_raw=True)
def _(a: Tensor, a_scale: Tensor, b: Tensor, *rest: Any, **options: Any) -> int:
    return 2 * a.shape[0] * b.shape[0] * a.shape[1] * (2 if a.dtype == torch.uint8 else 1)  # two codes to a byte


@register_flop_formula(torch.ops.quartet.decode_matmul, get_raw=True)
def _(x: Tensor, codes: Tensor, *rest: Any, **options: Any) -> int:
    return 2 * x.shape[0] * x.shape[1] * codes.shape[0]


@register_flop_formula(torch.ops.quartet.matmul_bf16, get_raw=True)
def _(x: Tensor, codes: Tensor, *rest: Any, **options: Any) -> int:
    return 2 * x.numel() * codes.shape[1] * 2
