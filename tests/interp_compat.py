"""Repairs of Triton's CPU interpreter (3.6 to 3.9) that the tests need; import it before modules with kernels.

It replaces internals of ``triton.runtime.interpreter``, and only where this version lacks or miscomputes something:
bfloat16 operands of a dot are multiplied as integers, float32 is cut instead of rounded to bfloat16 and mis-rounded to
FP8, and 3.6 has no ``dot_scaled``, propagates NaN through ``maximum`` and cannot loop to a run-time bound under numpy
2.4.
"""

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder
FLOAT8 = {tl.float8e5: (torch.float8_e5m2, 57344.0), tl.float8e4nv: (torch.float8_e4m3fn, 448.0)}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)


def from_bfloat16(bits: Any) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: Any) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _decode(codes: Any, axis: int) -> np.ndarray:
    codes = np.moveaxis(np.asarray(codes), axis, -1)
    out = np.empty((*codes.shape[:-1], codes.shape[-1] * 2), np.float32)
    out[..., 0::2], out[..., 1::2] = E2M1[codes & 15], E2M1[codes >> 4]
    return np.moveaxis(out, -1, axis)


def _scaled_operand(handle: Any, scale: Any, k_packed: bool, is_rhs: bool) -> np.ndarray:
    if handle.dtype.scalar == tl.float8e4nv:
        values = torch.from_numpy(np.ascontiguousarray(handle.data)).view(torch.float8_e4m3fn).float().numpy()
    else:
        axis = (-2 if k_packed else -1) if is_rhs else (-1 if k_packed else -2)
        values = _decode(handle.data, axis)
    if scale is None:
        return values
    exponents = scale.data.view(np.uint8).astype(np.int32)
    factors = np.ldexp(np.float32(1.0), exponents - 127).astype(np.float32)
    factors = np.where(exponents == 255, np.float32(np.nan), factors)
    factors = np.repeat(factors, values.shape[-2 if is_rhs else -1] // factors.shape[-1], axis=-1)
    return values * (np.swapaxes(factors, -1, -2) if is_rhs else factors)


def _add_dot_scaled() -> None:
    def create_dot_scaled(
        self: Any, lhs: Any, ls: Any, lf: Any, rhs: Any, rs: Any, rf: Any, fast: Any, lk: bool, rk: bool, acc: Any
    ) -> Any:
        product = np.matmul(_scaled_operand(lhs, ls, lk, False), _scaled_operand(rhs, rs, rk, True))
        return Handle(product + acc.data, tl.float32)

    original = tl.core.dot_scaled

    def dot_scaled(lhs: Any, ls: Any, lf: Any, rhs: Any, rs: Any, rf: Any, *args: Any, **kwargs: Any) -> Any:
        wrap = lambda x: x if isinstance(x, tl.constexpr) else tl.constexpr(x)  # noqa: E731
        return original(lhs, ls, wrap(lf), rhs, rs, wrap(rf), *args, **kwargs)

    dot_scaled.__triton_builtin__ = True  # type: ignore[attr-defined]
    Builder.create_dot_scaled = create_dot_scaled
    tl.dot_scaled = tl.core.dot_scaled = dot_scaled


def _repair_bfloat16() -> None:
    dot, cast = Builder.create_dot, Builder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        widen = lambda h: Handle(from_bfloat16(h.data), tl.float32) if h.dtype.scalar == tl.bfloat16 else h  # noqa: E731
        return dot(self, widen(a), widen(b), d, precision, imprecise)

    def cast_impl(self: Any, src: Any, dst: Any) -> Any:
        if src.dtype.scalar == tl.float32 and dst.scalar == tl.bfloat16:
            return Handle(to_bfloat16(src.data), tl.bfloat16)
        return cast(self, src, dst)

    Builder.create_dot, Builder.cast_impl = create_dot, cast_impl


def _repair_float8() -> None:
    cast = Builder.create_fp_to_fp

    def create_fp_to_fp(self: Any, src: Any, dst: Any, rounding: Any) -> Any:
        wide = src.dtype.scalar in (tl.float32, tl.float16, tl.bfloat16)
        if dst.scalar not in FLOAT8 or not wide or rounding == ir.ROUNDING_MODE.RTZ:
            return cast(self, src, dst, rounding)
        values = from_bfloat16(src.data) if src.dtype.scalar == tl.bfloat16 else src.data.astype(np.float32)
        dtype, largest = FLOAT8[dst.scalar]  # saturates, as cvt.rn.satfinite does
        rounded = torch.from_numpy(np.clip(values, -largest, largest)).to(dtype)
        return Handle(rounded.view(torch.uint8).numpy(), dst.scalar)

    Builder.create_fp_to_fp = create_fp_to_fp


def _repair_3_6() -> None:
    Builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    Builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))

    interpreter._patch_lang_tensor = patch_lang_tensor


if not hasattr(Builder, "create_dot_scaled"):
    _add_dot_scaled()
_repair_bfloat16()
_repair_float8()
if triton.__version__ < "3.7":
    _repair_3_6()
