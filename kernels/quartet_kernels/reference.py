"""Every operation in plain PyTorch: the definition that other backends are compared with, and the CPU's backend.

All arithmetic is float32, or float64 where the input is. Shapes: M rows, K (or N) elements a row, groups of 32 along
the last axis. A GEMM operand of this backend is the dequantised tensor ``code * scale`` and an empty second tensor.
Source: Quartet, arXiv 2505.14669 v4, Appendix A.1; QuEST, arXiv 2502.05003; OCP MX v1.0.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import philox
from .config import QuartetConfig
from .mxfp4 import GROUP_SIZE, NAN_SCALE, decode, pack_codes, pack_mask, unpack_mask
from .rotation import BACKWARD_GROUP_SIZE, rotation_matrix

QUEST_SCALE = 0.48707976
"""2.92247856 / 6: the scale that minimises the squared error of E2M1 rounding, in standard deviations of N(0, 1)."""
MIN_EXPONENT, MAX_EXPONENT = -126, 125
"""Bytes 1..252: every ``code * scale`` is then a finite float32."""
MXFP8_MIN_EXPONENT, MXFP8_MAX_EXPONENT = -117, 119
"""The same of E4M3 codes, whose smallest is 2^-9 and whose largest is 448; what is in between fits bfloat16, too."""
CACHED_ELEMENTS = 1 << 18
"""Elements that the CPU quantises at a time: some forty passes over them should stay in its cache."""
CPU_THREADS = CACHED_ELEMENTS // 32768
"""As many as PyTorch gives to one of these passes. The product that rotates would wake all threads of the host and the
next pass send most of them to sleep: with 64, a block took 150 times as long as with 4 (2026-11-28)."""

Operand = tuple[Tensor, Tensor]


def _layout(dtype: torch.dtype) -> tuple[torch.dtype, int, int]:
    """Integer type of the same size, mantissa bits, exponent bias."""
    return (torch.int64, 52, 1023) if dtype == torch.float64 else (torch.int32, 23, 127)


def _exponent(x: Tensor) -> Tensor:
    """floor(log2(x)) of positive finite x, int32, from the bit field (at least that of the smallest normal, - 1)."""
    integer, mantissa, bias = _layout(x.dtype)
    return ((x.view(integer) >> mantissa) - bias).to(torch.int32)


def _power(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2**exponent for exponents of normal numbers."""
    integer, mantissa, bias = _layout(dtype)
    return ((exponent.to(integer) + bias) << mantissa).view(dtype)


def _binade(u: Tensor) -> Tensor:
    """2**floor(log2|u|), at least 1: twice the step of the E2M1 grid around u."""
    integer, mantissa, bias = _layout(u.dtype)
    return (u.view(integer) & ((2 * bias + 1) << mantissa)).view(u.dtype).clamp_(min=1.0)


def round_nearest(u: Tensor) -> Tensor:
    """The nearest of {0, .5, 1, 1.5, 2, 3, 4, 6} with u's sign, ties to the even code, saturating at 6."""
    _, mantissa, _ = _layout(u.dtype)
    # Adding this constant leaves one mantissa bit of u, rounded by the hardware to nearest even.
    shift = _binade(u).mul_(1.5 * 2.0 ** (mantissa - 1))
    return (u + shift).sub_(shift).clamp_(-6.0, 6.0)


def round_stochastic(u: Tensor, random: Tensor) -> Tensor:
    """A grid neighbour of |u| < 6: the upper one iff ``(|u| - low) / step >= (255.5 - random) / 256``, random uint8."""
    step = _binade(u).mul_(0.5)
    quotient = u.abs().div_(step)
    low = quotient.floor()
    up = quotient.sub_(low) >= (255.5 - random.to(u.dtype)) / 256
    return (low + up).mul_(step).clamp_(max=6.0).copysign_(u)


def rotate(x: Tensor, matrix: Tensor | None, signs: Tensor | None = None) -> Tensor:
    """``(x D) H g**-1/2`` per block of g along the last axis, in x's dtype; float32 [M, K] or float64."""
    if matrix is None:
        return x
    if signs is not None:
        matrix = signs[:, None].to(matrix.dtype) * matrix
    size = matrix.shape[0]
    # Summed in float64 and rounded once: no order of summation, no TF32 or bf16 that a user may have switched on.
    total = x.reshape(-1, size).to(torch.float64) @ matrix.to(torch.float64)
    return (total.to(x.dtype) * _factor(size, x.dtype)).view(x.shape)


def _factor(size: int, dtype: torch.dtype) -> float:
    """size**-1/2 rounded to float32, or float64's own."""
    return size**-0.5 if dtype == torch.float64 else torch.tensor(size**-0.5, dtype=torch.float32, device="cpu").item()


def _group_statistics(v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of groups [..., 32]: largest magnitude (1 where the group is unusable), is it all zero, is it finite."""
    largest = v.abs().amax(-1)
    finite, zero = largest.isfinite(), largest == 0
    return torch.where(finite & ~zero, largest, 1.0), zero, finite


def _quest_statistic(v: Tensor, largest: Tensor, config: QuartetConfig) -> tuple[Tensor, Tensor]:
    """t * 2**-m and m, per group: the QuEST scale before it is rounded to a power of two."""
    limit = _layout(v.dtype)[2] - 1
    m = _exponent(largest).clamp_(-limit, limit)
    w = v * _power(-m, v.dtype)[..., None]
    if config.statistic == "std":
        # Exact for a constant group, whatever the order of the sum: its deviation is 0, not rounding.
        w = w - (w.sum(-1, keepdim=True, dtype=torch.float64) / GROUP_SIZE).to(w.dtype)
    return (w.square().sum(-1) / GROUP_SIZE).sqrt_() * QUEST_SCALE, m


def _project(v: Tensor, config: QuartetConfig) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rounded values, scaled values and exponents of groups [..., 32], and which groups are zero and finite."""
    largest, zero, finite = _group_statistics(v)
    abs_max = (_exponent(largest) - 2).clamp_(MIN_EXPONENT, MAX_EXPONENT)
    if config.forward_method == "abs_max":
        u = (v * _power(-abs_max, v.dtype)[..., None]).mul_(0.75)
        return round_nearest(u), u, abs_max, zero, finite

    t, m = _quest_statistic(v, largest, config)
    degenerate = t == 0  # a constant group has no centred deviation
    if config.scale_rule == "floor":
        t = t * _power(m, v.dtype) + 1e-8
        exponent = _exponent(t)
    else:
        exponent = _exponent(t) + m
        if config.scale_rule == "nearest":
            integer, mantissa, _ = _layout(v.dtype)
            significand = (t.view(integer) & ((1 << mantissa) - 1)) | _power(torch.zeros_like(m), v.dtype).view(integer)
            exponent = exponent + (significand.view(v.dtype) >= float.fromhex("0x1.6a09e6p0"))  # sqrt(2) in float32
    low = torch.where(degenerate, abs_max, exponent.clamp(MIN_EXPONENT, MAX_EXPONENT))
    u = v * _power(-low, v.dtype)[..., None]
    q = round_nearest(u)
    if config.scale_rule != "mse":
        return q, u, low, zero, finite

    high = torch.where(degenerate, abs_max, (exponent + 1).clamp(MIN_EXPONENT, MAX_EXPONENT))
    u_high = v * _power(-high, v.dtype)[..., None]
    q_high = round_nearest(u_high)
    error, error_high = (u - q).square_().sum(-1), (u_high - q_high).square_().sum(-1)
    wider = (error_high * 4 < error) & (high > low)
    pick = wider[..., None]
    return torch.where(pick, q_high, q), torch.where(pick, u_high, u), torch.where(wider, high, low), zero, finite


def _quantize_abs_max(v: Tensor, random: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The backward's quantiser, same results as `_project`: |u| < 6, so nothing clips. Stochastic with random."""
    largest, zero, finite = _group_statistics(v)
    exponent = (_exponent(largest) - 2).clamp_(MIN_EXPONENT, MAX_EXPONENT)
    u = (v * _power(-exponent, v.dtype)[..., None]).mul_(0.75)
    q = round_nearest(u) if random is None else round_stochastic(u, random.view(u.shape))
    return q, u, exponent, zero, finite


def _values(q: Tensor, exponent: Tensor, finite: Tensor) -> Tensor:
    """``code * scale`` [M, K] from groups [M, K/32, 32]; NaN for a group that is not finite."""
    scale = torch.where(finite, _power(exponent, q.dtype), torch.nan)
    return (q * scale[..., None]).flatten(-2)


def _pack(q: Tensor, u: Tensor, exponent: Tensor, zero: Tensor, finite: Tensor) -> tuple[Tensor, Tensor]:
    """Packed codes [M, K/2] and scale bytes [M, K/32] from groups [M, K/32, 32]."""
    # |q| + 2 in {2, 2.5, 3, 3.5, 4, 5, 6, 8} has the index in its three leading mantissa bits (8 counts on to 8).
    magnitude = (q.abs().to(torch.float32) + 2).view(torch.int32) >> 21
    index = magnitude.sub_(0x200).clamp_(max=7)
    codes = (index | (u.signbit().to(torch.int32) << 3)).to(torch.uint8)
    usable = finite & ~zero
    packed = pack_codes(codes).masked_fill_(~usable[..., None], 0).flatten(-2)
    scales = torch.where(finite, torch.where(zero, 0, exponent + 127), NAN_SCALE).to(torch.uint8)
    return packed, scales


def _accumulator(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _no_scale(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=torch.float32)


@contextlib.contextmanager
def _few_threads() -> Iterator[None]:
    """At most CPU_THREADS threads for an operation."""
    threads = torch.get_num_threads()
    torch.set_num_threads(min(threads, CPU_THREADS))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _by_rows(x: Tensor, function: Callable[[Tensor, int], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """``function(rows, index of the first)`` over blocks of x [M, K] that fit a CPU's cache, put together again."""
    if x.device.type != "cpu":
        return function(x, 0)
    with _few_threads():
        rows = max(1, CACHED_ELEMENTS // max(1, x.shape[1]))
        parts = [function(block, index * rows) for index, block in enumerate(x.split(rows))]
        return parts[0] if len(parts) == 1 else tuple(map(torch.cat, zip(*parts, strict=True)))


def quantize_forward(
    x: Tensor, *, config: QuartetConfig, mask: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """Rotate and project x [M, K]: codes uint8 [M, K/2], scales uint8 [M, K/32], clip mask int32 [M, K/32] or None,
    and the GEMM operand."""
    matrix = rotation_matrix(config.transform_init, config.hadamard_group_size, x.device)

    def project(rows: Tensor, _: int) -> tuple[Tensor, ...]:
        v = rotate(_accumulator(rows), matrix).unflatten(-1, (-1, GROUP_SIZE))
        q, u, exponent, zero, finite = _project(v, config)
        packed = (*_pack(q, u, exponent, zero, finite), _values(q, exponent, finite))
        if not mask:
            return packed
        keep = (u.abs() < 6) if config.forward_method == "quest" else torch.ones_like(u, dtype=torch.bool)
        return *packed, pack_mask(keep.flatten(-2)).masked_fill_(~finite, -1)

    codes, scales, values, *words = _by_rows(x, project)
    return codes, scales, words[0] if mask else None, values, _no_scale(x)


def quantize_backward(
    x: Tensor,
    *,
    signs: Tensor | None,
    sign_role: int | None,
    seed: Tensor | None,
    role: int,
    rounding: str,
    transpose: bool,
    packed: bool = False,
) -> Operand:
    """Rotate x [M, N] along N (or x.T along M, padded with zeros to a multiple of 32) with signs on the input side and
    quantise it by its absolute maximum; the operand, or packed codes and scales, leaves out the factor 4/3.

    ``signs`` float32 [32] are used as given; else ``sign_role`` draws them from ``seed``; else they are +1.
    """
    if signs is None and sign_role is not None:
        assert seed is not None
        signs = philox.draw_signs(seed, sign_role)
    matrix = rotation_matrix("hadamard", BACKWARD_GROUP_SIZE, x.device)

    def quantize(rows: Tensor, first: int) -> tuple[Tensor, ...]:
        rows = _accumulator(rows)
        rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % GROUP_SIZE)).contiguous()
        v = rotate(rows, matrix, signs).unflatten(-1, (-1, GROUP_SIZE))
        random = None
        if rounding == "stochastic":
            assert seed is not None
            random = philox.random_bytes(seed, role, first * v.shape[1], v.shape[0] * v.shape[1])
        q, u, exponent, zero, finite = _quantize_abs_max(v, random)
        return _pack(q, u, exponent, zero, finite) if packed else (_values(q, exponent, finite),)

    first, *second = _by_rows(x.t() if transpose else x, quantize)
    return first, second[0] if packed else _no_scale(x)


quantize_backward_packed = functools.partial(quantize_backward, packed=True)
"""The same, as codes and scales."""


def quantize_mxfp8(x: Tensor, *, transpose: bool) -> Operand:
    """x [M, N] in MXFP8, or x.T along M, padded with zeros to a multiple of 32: E4M3 codes, rounded to nearest even,
    relative to ``2^(floor(log2 max|v|) - 7)`` of 32 elements, so nothing saturates. No rotation."""

    def quantize(rows: Tensor, first: int) -> tuple[Tensor, ...]:
        rows = _accumulator(rows)
        rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % GROUP_SIZE)).contiguous()
        v = rows.unflatten(-1, (-1, GROUP_SIZE))
        largest, _zero, finite = _group_statistics(v)
        exponent = (_exponent(largest) - 7).clamp_(MXFP8_MIN_EXPONENT, MXFP8_MAX_EXPONENT)
        u = (v * _power(-exponent, v.dtype)[..., None]).clamp_(-448, 448)
        return (_values(u.to(torch.float8_e4m3fn).to(u.dtype), exponent, finite),)

    (values,) = _by_rows(x.t() if transpose else x, quantize)
    return values, _no_scale(x)


def requantize(
    codes: Tensor,
    scales: Tensor,
    *,
    signs: Tensor | None,
    sign_role: int | None,
    seed: Tensor | None,
    role: int,
    rounding: str,
    dtype: torch.dtype = torch.float32,
) -> Operand:
    """The operand of the transposed tensor, [K, M] grouped along M, from packed [M, K/2]: reads ``code * scale``."""
    return quantize_backward(
        decode(codes, scales, dtype),
        signs=signs,
        sign_role=sign_role,
        seed=seed,
        role=role,
        rounding=rounding,
        transpose=True,
    )


def expand(codes: Tensor, scales: Tensor, *, dtype: torch.dtype = torch.float32) -> Operand:
    """The operand of a packed tensor [M, K/2]."""
    return decode(codes, scales, dtype), _no_scale(codes)


def unrotate(
    product: Tensor,
    *,
    alpha: float,
    mask: Tensor | None,
    matrix: Tensor | None,
    out_dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """``alpha * select(mask, product, 0)`` [M, N], rotated back per block along N; into ``out``, which may be the
    product, if there is one."""
    if alpha != 1:
        product = product * alpha
    if mask is not None:
        product = torch.where(unpack_mask(mask), product, 0.0)
    if matrix is not None:
        product = rotate(product, matrix.t())
    return product.to(out_dtype) if out is None else out.copy_(product)


def matmul(
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
    """``alpha * A @ B.T + bias`` of two operands, A [M, K], B [N, K]; for the backward, clip mask int32 [M, N/32] and
    inverse rotation of the result, in float32 before the cast; never beside a bias, which gradients have not."""
    product = a @ b.t()
    if bias is None:
        return unrotate(product, alpha=alpha, mask=mask, matrix=matrix, out_dtype=out_dtype)
    return (product * alpha + bias.to(product.dtype)).to(out_dtype)


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
    """Straight-through backward: x [M, N], rounded to bfloat16, times ``code * scale`` [N, K] (or x.T times [M, K]),
    with the same epilogue as `matmul`."""
    wide = _accumulator(x).dtype
    x = x.to(torch.bfloat16).to(wide)
    product = (x.t() if transpose else x) @ decode(codes, scales, wide)
    return unrotate(product, alpha=alpha, mask=mask, matrix=matrix, out_dtype=out_dtype)


def matmul_mxfp8(
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
    """`matmul_bf16` with both operands in MXFP8, grouped along the axis that is contracted."""
    a, _ = quantize_mxfp8(x, transpose=transpose)
    b, _ = quantize_mxfp8(decode(codes, scales, a.dtype), transpose=True)
    return unrotate(a @ b.t(), alpha=alpha, mask=mask, matrix=matrix, out_dtype=out_dtype)
