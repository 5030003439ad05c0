"""The layer's door into a backend: custom operators, opaque to ``torch.compile``, with fake kernels.

Each takes a configuration as `QuartetConfig.text`, since schemas know no classes, and resolves its backend from
its input's device; shapes and meanings are those of `quartet_kernels.reference`. A missing mask or operand is an
empty tensor of one dimension, since an operator cannot return None.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .backends import Backend, select_backend
from .config import QuartetConfig, parse_config
from .mxfp4 import GROUP_SIZE
from .philox import GRAD, GRAD_T, INPUT_T, SIGNS_DW, SIGNS_DX, WEIGHT_T
from .rotation import rotation_matrix

_LIBRARY = torch.library.Library("quartet", "DEF")

BACKWARD_FACTOR = 4 / 3
"""Backward operands hold 3/4 of their value: see `quartet_kernels.reference.quantize_backward`."""


def forward_factor(config: QuartetConfig) -> float:
    """What a forward tensor's ``code * scale`` is multiplied with."""
    return 4 / 3 if config.forward_method == "abs_max" else 1.0


def compute_dtype(x: Tensor) -> torch.dtype:
    """What operands that are not quantised are computed in."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _operator(function: Callable[..., Any]) -> torch._ops.OpOverload:
    """Make a function the operator ``quartet::name``.

    Not ``torch.library.custom_op``, whose wrapper takes the host several times as long per call (40 microseconds
    against 6 on a loaded CPU): a layer makes five calls, and has its own autograd function above them.
    """
    name = function.__name__
    schema = torch.library.infer_schema(function, mutates_args=())
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    return getattr(torch.ops.quartet, name).default


def _backend(config: QuartetConfig, x: Tensor) -> Backend:
    return select_backend(config.backend, x.device, x.dtype)


class _NoAutocast:
    """``torch.autocast(..., enabled=False)``, which takes the host several times as long, around what a layer runs."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __enter__(self) -> None:
        torch.set_autocast_enabled(self.kind, False)

    def __exit__(self, *error: object) -> None:
        torch.set_autocast_enabled(self.kind, True)


def no_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    # Autocast would turn the reference's float32 products into bfloat16 ones.
    kind = x.device.type
    return _NoAutocast(kind) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def _none(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype, device=x.device)


def _part(backend: Backend, data: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """What an operand has beyond the packed tensor, which an operator must not return once more."""
    if not backend.packed:
        return data, scale
    return _none(data, torch.uint8), _none(data, torch.uint8) if scale.dim() == 2 else scale


def operand(codes: Tensor, scales: Tensor, data: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The operand of a packed tensor, from it and what `quantize_forward` or `expand` returned for it beyond."""
    if data.dim() == 2:
        return data, scale
    return codes, scales if scale.dim() == 1 else scale


@_operator
def quantize_forward(x: Tensor, config: str, mask: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = parse_config(config)
    with no_autocast(x):
        codes, scales, words, data, scale = _backend(options, x).quantize_forward(x, config=options, mask=mask)
    return (
        codes,
        scales,
        _none(x, torch.int32) if words is None else words,
        _none(x, torch.uint8) if data is None else data,
        _none(x, torch.uint8) if scale is None else scale,
    )


@torch.library.register_fake("quartet::quantize_forward", lib=_LIBRARY)
def _(x: Tensor, config: str, mask: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, columns = x.shape
    chosen = _backend(parse_config(config), x)
    data, scale = _part(chosen, *chosen.empty_operand(x, rows, columns))
    words = x.new_empty(rows, columns // GROUP_SIZE, dtype=torch.int32) if mask else _none(x, torch.int32)
    codes = x.new_empty(rows, columns // 2, dtype=torch.uint8)
    return codes, x.new_empty(rows, columns // GROUP_SIZE, dtype=torch.uint8), words, data, scale


@_operator
def expand(codes: Tensor, scales: Tensor, dtype: torch.dtype, config: str) -> tuple[Tensor, Tensor]:
    chosen = select_backend(parse_config(config).backend, codes.device, dtype)
    return _part(chosen, *chosen.expand(codes, scales, dtype=dtype))


@torch.library.register_fake("quartet::expand", lib=_LIBRARY)
def _(codes: Tensor, scales: Tensor, dtype: torch.dtype, config: str) -> tuple[Tensor, Tensor]:
    chosen = select_backend(parse_config(config).backend, codes.device, dtype)
    empty = chosen.empty_operand(codes.new_empty(0, dtype=dtype), codes.shape[0], codes.shape[1] * 2)
    return _part(chosen, *empty)


@_operator
def matmul(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype, config: str
) -> Tensor:
    options = parse_config(config)
    accumulation = options.accumulation
    if accumulation == "auto" and options.transform_init == "identity":
        accumulation = "precise"  # without a rotation, products of one sign add up to what fast accumulation loses
    with no_autocast(a):
        return select_backend(options.backend, a.device, out_dtype).matmul(
            a,
            a_scale,
            b,
            b_scale,
            alpha=forward_factor(options) ** 2,
            bias=bias,
            mask=None,
            matrix=None,
            out_dtype=out_dtype,
            accumulation=accumulation,
        )


@torch.library.register_fake("quartet::matmul", lib=_LIBRARY)
def _(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, bias: Tensor | None, out_dtype: torch.dtype, config: str
) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[0], dtype=out_dtype)


@_operator
def gradient(
    dy: Tensor,
    codes: Tensor,
    scales: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    signs: Tensor | None,
    transpose: bool,
    finish: bool,
    out_dtype: torch.dtype,
    config: str,
) -> Tensor:
    """dX = dY Wq from the weight's codes, or (transpose) dW = dY^T Xq from the input's; masked and (finish) rotated
    back. One operator, since the host pays for each call."""
    options = parse_config(config)
    backend = _backend(options, dy)
    matrix = None
    if finish:
        matrix = rotation_matrix(options.transform_init, options.hadamard_group_size, dy.device)
    factor = forward_factor(options)
    with no_autocast(dy):
        if options.backward_dtype != "mxfp4":
            multiply = backend.matmul_mxfp8 if options.backward_dtype == "mxfp8" else backend.matmul_bf16
            return multiply(
                dy, codes, scales, transpose=transpose, alpha=factor, mask=mask, matrix=matrix, out_dtype=out_dtype
            )
        rounding = options.backward_rounding
        sign_role = None
        if options.randomize_backward and signs is None:
            sign_role = SIGNS_DW if transpose else SIGNS_DX
        grad_role, other_role = (GRAD_T, INPUT_T) if transpose else (GRAD, WEIGHT_T)
        a = backend.quantize_backward(
            dy, signs=signs, sign_role=sign_role, seed=seed, role=grad_role, rounding=rounding, transpose=transpose
        )
        b = backend.requantize(
            codes,
            scales,
            signs=signs,
            sign_role=sign_role,
            seed=seed,
            role=other_role,
            rounding=rounding,
            dtype=compute_dtype(dy),
        )
        return backend.matmul(
            *a,
            *b,
            alpha=factor * BACKWARD_FACTOR**2,
            bias=None,
            mask=mask,
            matrix=matrix,
            out_dtype=out_dtype,
            accumulation=options.accumulation,
        )


@torch.library.register_fake("quartet::gradient", lib=_LIBRARY)
def _(
    dy: Tensor,
    codes: Tensor,
    scales: Tensor,
    mask: Tensor | None,
    seed: Tensor | None,
    signs: Tensor | None,
    transpose: bool,
    finish: bool,
    out_dtype: torch.dtype,
    config: str,
) -> Tensor:
    return dy.new_empty(dy.shape[1] if transpose else dy.shape[0], codes.shape[1] * 2, dtype=out_dtype)


@_operator
def decode_linear(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, out_dtype: torch.dtype, config: str
) -> Tensor:
    from .triton import decode

    options = parse_config(config)
    alpha = forward_factor(options) ** 2
    return decode.decode_linear(x, codes, scales, config=options, alpha=alpha, bias=bias, out_dtype=out_dtype)


@torch.library.register_fake("quartet::decode_linear", lib=_LIBRARY)
def _(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, out_dtype: torch.dtype, config: str) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0], dtype=out_dtype)


# For torch's FlopCounterMode, and so for Lightning's ModelSummary and ThroughputMonitor: the operations of a product,
# whatever the precision, as for torch.mm.


@register_flop_formula(torch.ops.quartet.matmul, get_raw=True)
def _(a: Tensor, a_scale: Tensor, b: Tensor, *rest: Any, **options: Any) -> int:
    return 2 * a.shape[0] * b.shape[0] * a.shape[1] * (2 if a.dtype == torch.uint8 else 1)  # two codes to a byte


@register_flop_formula(torch.ops.quartet.decode_linear, get_raw=True)
def _(x: Tensor, codes: Tensor, *rest: Any, **options: Any) -> int:
    return 2 * x.shape[0] * x.shape[1] * codes.shape[0]


@register_flop_formula(torch.ops.quartet.gradient, get_raw=True)
def _(dy: Tensor, codes: Tensor, *rest: Any, **options: Any) -> int:
    return 2 * dy.numel() * codes.shape[1] * 2
