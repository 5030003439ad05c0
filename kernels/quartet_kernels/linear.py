"""The Quartet linear layer as one differentiable function: forward and backward side by side."""

import functools
import threading
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import ops
from .backends import select_backend
from .config import QuartetConfig
from .mxfp4 import GROUP_SIZE, MXFP4Tensor
from .ops import compute_dtype
from .philox import make_seed
from .rotation import faking, make_matrices, rotation_matrix

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What can be quantised."""

Packed = tuple[Tensor, Tensor]


Projection = tuple[Packed, Tensor | None, Packed]
"""Packed codes and scales, clip mask, and the GEMM operand of a tensor."""


def _project(x: Tensor, config: QuartetConfig, mask: bool) -> Projection:
    """Rotate and quantise x [..., K], as M rows."""
    x = x.reshape(-1, x.shape[-1])
    codes, scales, words, data, scale = ops.quantize_forward(x, config.text, mask)
    packed = (codes, scales)
    return packed, words if mask else None, ops.operand(*packed, data, scale)


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _stream(x: Tensor) -> int:
    """Where x's projection is made: another stream would have to wait for it."""
    return torch._C._cuda_getCurrentRawStream(x.device.index) if x.is_cuda else 0


class _LastInput(threading.local):
    """The projection of the input that this thread's last layer read: q, k and v, or gate and up, read the same one.

    Only for activations that autograd made: a buffer that somebody keeps may be written in ways that leave its version
    as it is (``.data``, a replayed CUDA graph). It is dropped with the input. Compiled graphs need none: there, equal
    calls of an operator become one.
    """

    def __init__(self) -> None:
        self.key: tuple[object, ...] = ()
        self.source: weakref.ref[Tensor] | None = None
        self.kept: list[Projection] = []

    def project(self, x: Tensor, config: QuartetConfig, mask: bool) -> Projection:
        if x.grad_fn is None:
            return _project(x, config, mask)
        where = x.data_ptr() if type(x) is Tensor else 0  # a tracer's has no address
        inference = torch.is_inference_mode_enabled()  # what is made there cannot be saved for a backward
        key = (where, x.shape, x._version, mask, config, _stream(x), _capturing(x), inference)
        if not self.kept or self.source is None or self.source() is not x or self.key != key:
            kept = [_project(x, config, mask)]
            # Autograd's own threads may drop the input, and they do not see this thread's attributes.
            self.key, self.kept, self.source = key, kept, weakref.ref(x, lambda _: kept.clear())
        return self.kept[0]


_last_input = _LastInput()


class WeightWindow(threading.local):
    """Reuse of the weights' projections between micro-batches of one optimizer step, in this thread, not compiled.

    Who opens it promises to close it before weights change in ways that leave their version as it is (``.data``
    writes, swaps of averaged weights). Closed, as at first, it reuses nothing.
    """

    def __init__(self) -> None:
        self.step: int | None = None
        self._projections: dict[int, tuple[weakref.ref[Tensor], tuple[object, ...], Projection]] = {}

    def open(self, step: int) -> None:
        """Reuse projections until the window is closed or opened for another step."""
        if step != self.step:
            self._projections.clear()
        self.step = step

    def close(self) -> None:
        """Forget all projections."""
        self.step = None
        self._projections.clear()

    def project(self, weight: Tensor, config: QuartetConfig, mask: bool) -> Projection:
        """The weight's projection, made anew outside a window or where the weight is not what it was."""
        # A graph must quantise what it reads when it is replayed; what is made in inference mode serves no backward.
        if self.step is None or _capturing(weight) or torch.is_inference_mode_enabled() or weight.is_inference():
            return _project(weight, config, mask)
        key = (weight.data_ptr(), weight._version, mask, config, _stream(weight))
        projections, number = self._projections, id(weight)
        found = projections.get(number)
        if found is None or found[0]() is not weight or found[1] != key:

            def forget(weight: weakref.ref[Tensor]) -> None:  # one that was computed from other parameters
                if number in projections and projections[number][0] is weight:
                    del projections[number]

            found = (weakref.ref(weight, forget), key, _project(weight, config, mask))
            projections[number] = found
        return found[2]


weight_window = WeightWindow()


class _NoSecondDerivative(torch.autograd.Function):
    """The gradient that ``dy`` gave, whose own gradient is refused."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, dy: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise RuntimeError(
            "The gradients of a Quartet linear layer cannot be differentiated again (a gradient penalty, a Hessian): "
            "keep the layers that need it in high precision, for example with modules_to_not_convert."
        )


def _refuse_second_derivative(gradient: Tensor | None, dy: Tensor) -> Tensor | None:
    # Not torch's once_differentiable: where the incoming gradient is a constant, it gives constants, and a gradient
    # penalty would train nothing without a word.
    return None if gradient is None else _NoSecondDerivative.apply(gradient.detach().requires_grad_(), dy)


class _QuartetLinear(torch.autograd.Function):
    """``y = Xq Wq^T + b`` in the rotated basis; the backward is the paper's Algorithm (App. A.1, v4).

    x [..., K]; weight [N, K], or its packed codes and scales; y [T, N]. Saved for the backward: codes, scales and
    clip masks, 0.656 bytes an element; never x or the weight themselves. With both, the weight is not read: it only
    gets its gradient, as `finish_gradient` takes it. ``projection`` is that of x where it has been made.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        packed: Packed | None,
        bias: Tensor | None,
        seed: Tensor | None,
        signs: tuple[Tensor, Tensor] | None,
        projection: Projection | None,
        config: QuartetConfig,
        out_dtype: torch.dtype,
    ) -> Tensor:
        need_dx, need_dw = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        clips = config.forward_method == "quest"
        if projection is None:
            project = _project if torch.compiler.is_compiling() else _last_input.project
            projection = project(x, config, need_dx and clips)
        x_packed, x_mask, a = projection
        w_mask = None
        ctx.finished = packed is None
        if packed is None:
            assert weight is not None
            project_weight = _project if torch.compiler.is_compiling() else weight_window.project
            packed, w_mask, b = project_weight(weight, config, need_dw and clips)
        else:
            b = ops.operand(*packed, *ops.expand(*packed, compute_dtype(x), config.text))

        ctx.config, ctx.x_dtype, ctx.x_shape = config, x.dtype, x.shape
        ctx.weight_dtype = None if weight is None else weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(
            *(packed if need_dx else (None, None)),
            x_mask,
            *(x_packed if need_dw else (None, None)),
            w_mask,
            seed,
            *(signs or (None, None)),
        )
        return ops.matmul(*a, *b, bias, out_dtype, config.text)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return _QuartetLinear.gradients(ctx, dy)
        with torch.no_grad():  # create_graph=True
            gradients = _QuartetLinear.gradients(ctx, dy)
        return tuple(_refuse_second_derivative(gradient, dy) for gradient in gradients)

    @staticmethod
    def gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        w_codes, w_scales, x_mask, x_codes, x_scales, w_mask, seed, signs_dx, signs_dw = ctx.saved_tensors
        dx = dw = db = None
        config, text = ctx.config, ctx.config.text
        if seed is None and draws(config, signs_dx) and any(ctx.needs_input_grad[:2]):
            raise RuntimeError("A traced Quartet linear layer has no backward; train the model that was traced.")
        if ctx.needs_input_grad[0]:
            dx = ops.gradient(dy, w_codes, w_scales, x_mask, seed, signs_dx, False, True, ctx.x_dtype, text)
            dx = dx.view(ctx.x_shape)
        if ctx.needs_input_grad[1]:
            options = (seed, signs_dw, True, ctx.finished, ctx.weight_dtype, text)
            dw = ops.gradient(dy, x_codes, x_scales, w_mask, *options)
        if ctx.needs_input_grad[3]:
            db = dy.sum(0, dtype=compute_dtype(dy)).to(ctx.bias_dtype)
        return dx, dw, None, db, None, None, None, None, None


def draws(config: QuartetConfig, signs: object = None) -> bool:
    """Whether a backward, with these signs or its own, reads random bits."""
    signed = config.randomize_backward and signs is None
    return config.backward_dtype == "mxfp4" and (signed or config.backward_rounding == "stochastic")


def finish_gradient(gradient: Tensor, mask: Tensor | None, config: QuartetConfig) -> Tensor:
    """Mask and rotate back, in place, a gradient that ``quartet_linear(..., master=...)`` gave: that of the weight.

    It is linear and works row by row, so it may follow a sum over micro-batches or ranks, on any rows of the two.

    Args:
        gradient: float [N, K], in the rotated basis, not clipped; overwritten.
        mask: Clip mask of the weight, int32 [N, K/32]; None where the forward method clips nothing.
        config: That of the layer.

    Returns:
        The gradient.
    """
    matrix = rotation_matrix(config.transform_init, config.hadamard_group_size, gradient.device)
    wide = gradient.to(compute_dtype(gradient))
    backend = select_backend(config.backend, wide.device, wide.dtype)
    out = gradient if gradient.is_contiguous() else None
    done = backend.unrotate(wide, alpha=1.0, mask=mask, matrix=matrix, out_dtype=gradient.dtype, out=out)
    return gradient if done is gradient else gradient.copy_(done)


def _make_seed(seed: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(make_seed(seed), dtype=torch.int64, device=device)


# Made once per device: a copy from the host would stop the stream at every call.
_constant_seed = functools.lru_cache(maxsize=128)(_make_seed)


def _check_layout(name: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise TypeError(f"{name} is a sparse or nested tensor; use an ordinary one, for example its values().")


def _check(
    x: Tensor,
    weight: Tensor | MXFP4Tensor,
    bias: Tensor | None,
    config: QuartetConfig,
    master: Tensor | None = None,
) -> None:
    if not isinstance(config, QuartetConfig):
        raise TypeError(f"config is a {type(config).__name__}; pass a QuartetConfig.")
    if len(weight.shape) != 2:
        raise ValueError(f"The weight has shape {tuple(weight.shape)}; it is [out_features, in_features].")
    out_features, in_features = weight.shape
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"x has shape {tuple(x.shape)}; its last axis must be in_features = {in_features}.")
    if in_features % config.rotation_width or in_features == 0:
        raise ValueError(
            f"in_features is {in_features}; it must be a multiple of the rotation's {config.rotation_width}."
        )
    if out_features % GROUP_SIZE or out_features == 0:
        raise ValueError(f"out_features is {out_features}; it must be a multiple of {GROUP_SIZE}.")
    stored = weight.codes if isinstance(weight, MXFP4Tensor) else weight
    for name, tensor in (("x", x), ("weight", stored), ("bias", bias)):
        if tensor is None:
            continue
        _check_layout(name, tensor)
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}; move them to one device.")
        if tensor.dtype not in FLOAT_DTYPES and not (name == "weight" and isinstance(weight, MXFP4Tensor)):
            raise TypeError(f"{name} is {tensor.dtype}; use float32, bfloat16, float16 or float64.")
    if isinstance(weight, MXFP4Tensor):
        if weight.factor != ops.forward_factor(config):
            raise ValueError(
                f"The packed weight has factor {weight.factor}; with forward_method={config.forward_method!r} it is "
                f"{ops.forward_factor(config)}: pack it with the same config, in mode='forward'."
            )
    elif (x.dtype == torch.float64) != (weight.dtype == torch.float64):
        raise TypeError(f"x is {x.dtype} and the weight {weight.dtype}; float64 goes only with float64.")
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it must be [{out_features}].")
    if master is not None and (not isinstance(weight, MXFP4Tensor) or master.shape != weight.shape):
        raise ValueError(
            f"master has shape {tuple(master.shape)}; it goes with a packed weight and has its shape, "
            f"{tuple(weight.shape)}."
        )


def quartet_linear(
    x: Tensor,
    weight: Tensor | MXFP4Tensor,
    bias: Tensor | None = None,
    *,
    config: QuartetConfig,
    seed: Tensor | int | None = None,
    signs: tuple[Tensor, Tensor] | None = None,
    master: Tensor | None = None,
) -> Tensor:
    """A linear layer whose three matrix products run in MXFP4 (arXiv 2505.14669, App. A.1); differentiable once.

    Args:
        x: float [..., in_features]: float32, bfloat16, float16 or float64; any number of tokens, also none.
        weight: float [out_features, in_features], or an `MXFP4Tensor` of the rotated weight, which gets no
            gradient. in_features is a multiple of the rotation's group, out_features of 32.
        bias: float [out_features].
        config: Numerics.
        seed: int64 [3] on x's device, ``(layer << 32 | seed, step, rank << 16 | micro_batch)``; copied, so it may be
            advanced in place before the backward. An int n means (n, 0, 0), None means (config.seed, 0, 0).
        signs: Two float32 [32] of +-1, for dX and for dW, instead of those that the seed would draw.
        master: With a packed weight, a float tensor of its shape that gets the weight's gradient, in the rotated basis
            and not clipped, for `quartet_kernels.linear.finish_gradient`; its values are not read.

    Returns:
        [..., out_features] in x's dtype, or in autocast's where that is on.

    Raises:
        TypeError: If a dtype or the config's type is not one of the above.
        ValueError: If shapes, devices, seed or signs do not fit.
        RuntimeError: If the chosen backend cannot run on x's device, a seed that is not a tensor is used while a
            CUDA graph is captured, it is called under a transform of torch.func, or (from autograd) its gradients are
            differentiated again.
    """
    _check(x, weight, bias, config, master)
    if torch.compiler.is_compiling():  # the operators' fake kernels ask for the backend, without being traced
        make_matrices(config.text, x.device)
    else:
        select_backend(config.backend, x.device, x.dtype)
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                "Quartet linear layers do not run under transforms of torch.func (grad, vmap, jvp): call "
                "revert_from_quartet(model) first, or use torch.autograd."
            )
    out_dtype = x.dtype
    if out_dtype != torch.float64 and x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        out_dtype = torch.get_autocast_dtype(x.device.type)

    packed = None
    if isinstance(weight, MXFP4Tensor):
        packed = weight.codes, weight.scales
    else:
        master = weight
    # A trace holds a forward only, and a seed in it would make two traces differ.
    grad_mode = torch.is_grad_enabled() and not torch.jit.is_tracing()
    needs_grad = grad_mode and (x.requires_grad or (master is not None and master.requires_grad))
    if type(seed) not in (int, type(None)) and not isinstance(seed, Tensor):
        raise TypeError(f"seed is {seed!r}; pass an int64 [3] tensor, an int or None.")
    if needs_grad and draws(config, signs):
        seed = _seed_tensor(seed, config, x.device)
    else:
        seed = None
    if signs is not None:
        if len(signs) != 2:
            raise ValueError(f"signs are {len(signs)} tensors; pass two, for dX and for dW.")
        signs = (_checked_signs(signs[0], x.device), _checked_signs(signs[1], x.device))

    bias_trains = grad_mode and bias is not None and bias.requires_grad
    if packed is not None and not needs_grad and not bias_trains and _few_tokens(x, config):
        return _decode(x, packed, bias, config, out_dtype)
    projection = None
    if config.recompute_inputs and _may_recompute(x, master):
        clips = config.forward_method == "quest"
        projection = checkpoint(_project, x.detach(), config, clips, use_reentrant=False)
    y = _QuartetLinear.apply(x, master, packed, bias, seed, signs, projection, config, out_dtype)
    # Not inside the function: autograd lets nobody write into a view that a function returned.
    return y.view(*x.shape[:-1], y.shape[1])


def _may_recompute(x: Tensor, master: Tensor | None) -> bool:
    """Whether a compiled layer keeps codes of x that its backward could make again: for the weight's gradient, and
    not of data, which a model may write over without autograd noticing."""
    # Not `is_exporting()`, which torch 2.11 takes for true while it compiles.
    compiling = torch.compiler.is_compiling() and not torch.compiler._is_exporting_flag
    return compiling and torch.is_grad_enabled() and x.requires_grad and master is not None and master.requires_grad


DECODE_TOKENS = 32
"""Up to here, without gradients, packed weights are multiplied by a kernel that reads them as they are; measured, see
BENCHMARKS.md."""


def _few_tokens(x: Tensor, config: QuartetConfig) -> bool:
    if not 0 < x.numel() <= DECODE_TOKENS * x.shape[-1] or x.dtype == torch.float64 or config.backend == "reference":
        return False
    if torch.version.hip is not None:
        return False  # the kernel is made of NVIDIA's instructions
    return _has_kernels(config.backend, x.device, x.dtype)


@torch.compiler.assume_constant_result
def _has_kernels(backend: str, device: torch.device, dtype: torch.dtype) -> bool:
    return select_backend(backend, device, dtype).name != "reference"


def _decode(x: Tensor, packed: Packed, bias: Tensor | None, config: QuartetConfig, out_dtype: torch.dtype) -> Tensor:
    """The forward for a few tokens."""
    y = ops.decode_linear(x.reshape(-1, x.shape[-1]), *packed, bias, out_dtype, config.text)
    return y.view(*x.shape[:-1], y.shape[1])


def _seed_tensor(seed: Tensor | int | None, config: QuartetConfig, device: torch.device) -> Tensor:
    if device.type == "meta":  # a layer without data has its seed on the CPU
        return torch.empty(3, dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or tuple(seed.shape) != (3,) or seed.device != device:
            raise ValueError(
                f"The seed is {seed.dtype} {tuple(seed.shape)} on {seed.device}; it must be int64 [3] on {device}."
            )
        return seed.clone()
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("A CUDA graph replays one seed for ever; pass seed as an int64 [3] tensor and advance it.")
    number = config.seed if seed is None else seed
    make = _make_seed if torch.compiler.is_compiling() or faking() else _constant_seed
    return make(number, device)


def _checked_signs(signs: Tensor, device: torch.device) -> Tensor:
    if signs.dtype != torch.float32 or tuple(signs.shape) != (GROUP_SIZE,) or signs.device != device:
        raise ValueError(
            f"signs are {signs.dtype} {tuple(signs.shape)} on {signs.device}; they must be float32 [32] on {device}."
        )
    return signs.contiguous()
