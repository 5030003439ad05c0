"""Quantisation and products of packed tensors, for use without a layer."""

from typing import Literal

import torch
from torch import Tensor

from . import reference
from .backends import load_backend, select_backend
from .config import QuartetConfig
from .linear import FLOAT_DTYPES, _check_layout, _checked_signs, _seed_tensor
from .mxfp4 import GROUP_SIZE, MXFP4Tensor
from .ops import BACKWARD_FACTOR, forward_factor, no_autocast
from .philox import GRAD


def quantize_mxfp4(
    x: Tensor,
    *,
    config: QuartetConfig | None = None,
    signs: Tensor | None = None,
    mode: Literal["forward", "backward"] = "forward",
    rounding: str | None = None,
    seed: Tensor | int | None = None,
    return_mask: bool = False,
    backend: str = "auto",
) -> MXFP4Tensor | tuple[MXFP4Tensor, Tensor]:
    """Rotate x along its last axis and quantise it to MXFP4.

    Args:
        x: float [..., K]; K a multiple of 32 and, in the forward mode, of the rotation's group.
        config: Numerics; the default recipe if None.
        signs: float32 [32] of +-1, the D of ``x D H``; backward mode only. None means +1: none are drawn here.
        mode: ``"forward"`` projects as config says; ``"backward"`` rotates in blocks of 32 and scales by the absolute
            maximum, so nothing clips.
        rounding: ``"nearest"`` or ``"stochastic"``, backward mode only; None takes config's.
        seed: Of stochastic rounding, as in `quartet_linear`; the role is that of the gradient.
        return_mask: Return the clip mask too, int32 [..., K/32].
        backend: A backend's name.

    Returns:
        The tensor in the rotated basis, or (tensor, mask).

    Raises:
        TypeError: If x or config is not what it should be.
        ValueError: If an option is unknown or does not apply to the mode, or a shape does not fit.
        RuntimeError: If the backend cannot run on x's device.
    """
    config = QuartetConfig() if config is None else config
    if not isinstance(config, QuartetConfig):
        raise TypeError(f"config is {config!r}; pass a QuartetConfig or None.")
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}; pass a tensor.")
    _check_layout("x", x)
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"x is {x.dtype}; use float32, bfloat16, float16 or float64.")
    if mode not in ("forward", "backward"):
        raise ValueError(f"mode is {mode!r}; choose 'forward' or 'backward'.")
    if rounding not in (None, "nearest", "stochastic"):
        raise ValueError(f"rounding is {rounding!r}; choose 'nearest' or 'stochastic'.")
    if mode == "forward" and (signs is not None or rounding == "stochastic"):
        raise ValueError("signs and stochastic rounding belong to mode='backward'; the forward has neither.")
    group = config.rotation_width if mode == "forward" else GROUP_SIZE
    if x.dim() == 0 or x.shape[-1] % group or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last axis must be a multiple of {group}.")

    # The quantisers of all others are the same, and these write scales as they are stored.
    name = "reference" if select_backend(backend, x.device, x.dtype).name == "reference" else "triton"
    rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
    mask = None
    if mode == "forward":
        codes, scales, mask, _, _ = load_backend(name).quantize_forward(rows, config=config, mask=return_mask)
        factor = forward_factor(config)
    else:
        rounding = rounding or config.backward_rounding
        words = _seed_tensor(seed, config, x.device) if rounding == "stochastic" else None
        quantize = reference.quantize_backward_packed if name == "reference" else load_backend(name).quantize_backward
        codes, scales = quantize(
            rows,
            signs=None if signs is None else _checked_signs(signs, x.device),
            sign_role=None,
            seed=words,
            role=GRAD,
            rounding=rounding,
            transpose=False,
        )
        factor = BACKWARD_FACTOR
        if return_mask:
            mask = torch.full_like(scales, -1, dtype=torch.int32)
    leading = x.shape[:-1]
    codes, scales = (part.view(*leading, part.shape[1]) for part in (codes, scales))  # -1 fails without elements
    tensor = MXFP4Tensor(codes, scales, factor)
    return (tensor, mask.view(scales.shape)) if mask is not None else tensor


def mxfp4_matmul(
    a: MXFP4Tensor,
    b: MXFP4Tensor,
    *,
    alpha: float = 1.0,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: str = "auto",
) -> Tensor:
    """``alpha * A @ B.T + bias`` of packed tensors, factors included, accumulated in float32.

    Args:
        a: [M, K].
        b: [N, K].
        alpha: Multiplies the product.
        bias: float [N].
        out_dtype: float32, bfloat16 or float16.
        backend: A backend's name.

    Returns:
        [M, N] in out_dtype.

    Raises:
        TypeError: If a or b is no MXFP4Tensor, or out_dtype is not one of the above.
        ValueError: If shapes or devices do not fit.
        RuntimeError: If the backend cannot run there.
    """
    for name, operand in (("a", a), ("b", b)):
        if not isinstance(operand, MXFP4Tensor):
            raise TypeError(f"{name} is a {type(operand).__name__}; pass an MXFP4Tensor, as quantize_mxfp4 makes it.")
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"a has shape {tuple(a.shape)} and b {tuple(b.shape)}; they must be [M, K] and [N, K].")
    if a.codes.device != b.codes.device:
        raise ValueError(f"a is on {a.codes.device} and b on {b.codes.device}; move them to one device.")
    if out_dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"out_dtype is {out_dtype}; use float32, bfloat16 or float16.")
    if bias is not None and (tuple(bias.shape) != (b.shape[0],) or bias.device != a.codes.device):
        raise ValueError(f"bias is {tuple(bias.shape)} on {bias.device}; it must be [{b.shape[0]}] beside a.")
    chosen = select_backend(backend, a.codes.device, torch.float32)
    backend_ = chosen if chosen.packed or chosen.name == "reference" else load_backend("triton")
    with no_autocast(a.codes):
        return backend_.matmul(
            *backend_.expand(a.codes, a.scales),
            *backend_.expand(b.codes, b.scales),
            alpha=alpha * a.factor * b.factor,
            bias=bias,
            mask=None,
            matrix=None,
            out_dtype=out_dtype,
            accumulation="precise",
        )
