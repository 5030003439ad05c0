"""QuartetLinear: an ``nn.Linear`` whose three matrix products run in MXFP4."""

import warnings
from collections.abc import Callable
from itertools import count
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quartet.gathered import GatheredWeight
from quartet_kernels import MXFP4Tensor, QuartetConfig, quantize_mxfp4, quartet_linear
from quartet_kernels.backends import select_backend
from quartet_kernels.linear import draws
from quartet_kernels.ops import forward_factor
from quartet_kernels.reference import rotate
from quartet_kernels.rotation import rotation_matrix


class QuartetLinear(nn.Linear):
    """``y = x W^T + b`` with forward and backward products in MXFP4; parameters and state dict are ``nn.Linear``'s.

    Usually made by `lightning_quartet.convert_to_quartet`, which gives existing layers this class.

    Args:
        in_features: Size of the last axis of the input, a multiple of ``config.rotation_width``.
        out_features: Size of the last axis of the output, a multiple of 32.
        bias: Whether to add a learnable bias.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        config: The numerics; ``None`` means ``QuartetConfig()``.

    Attributes:
        quartet_config: The numerics of this layer.
        quartet_enabled: ``False`` computes ``nn.Linear``'s plain product (a high-precision phase of a training).

    Raises:
        TypeError: If ``config`` is not one.
        ValueError: If a size is not such a multiple.
    """

    quartet_config: QuartetConfig
    quartet_enabled: bool
    _quartet_seed: Tensor
    _quartet_step_set: bool

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        config: QuartetConfig | None = None,
    ) -> None:
        config = QuartetConfig() if config is None else config
        if not isinstance(config, QuartetConfig):
            raise TypeError(f"QuartetLinear: config is {config!r}; pass a QuartetConfig or None.")
        reason = unsupported_shape(in_features, out_features, config)
        if reason is not None:
            raise ValueError(f"QuartetLinear({in_features}, {out_features}): {reason}; use nn.Linear here.")
        super().__init__(in_features, out_features, bias, device, dtype)
        become_quartet(self, config)

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``, in the input's dtype or autocast's."""
        if not self.quartet_enabled:
            return plain_linear(input, self.weight, self.bias)
        if not torch.compiler.is_compiling() and not self._quartet_step_set and torch.is_grad_enabled():
            _warn_step_never_set(self)
        weight = self.weight
        if isinstance(weight, GatheredWeight):
            # Made here: torch.compile takes a method of the weight for an operator, and breaks the graph.
            packed = MXFP4Tensor(weight.codes, weight.scales, forward_factor(self.quartet_config))
            return quartet_linear(
                input, packed, self.bias, config=self.quartet_config, seed=self._quartet_seed, master=weight
            )
        if _is_dtensor(weight):
            from lightning_quartet.tensor_parallel import parallel_linear

            return parallel_linear(input, weight, self.bias, self.quartet_config, self._quartet_seed)
        # Nothing here differs between layers of one shape for the compiler: the layer's number is inside the seed.
        return quartet_linear(input, weight, self.bias, config=self.quartet_config, seed=self._quartet_seed)

    def quantized_weight(self) -> MXFP4Tensor:
        """The weight as the forward multiplies it: rotated and packed, [out_features, in_features]."""
        return quantize_weight(self.weight, self.quartet_config)

    def dequantized_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The quantised weight rotated back: the matrix [out_features, in_features] that an ``nn.Linear`` would hold.

        It is computed in float32 and detached; it lies on no MXFP4 grid unless there is no rotation.
        """
        config, packed = self.quartet_config, self.quantized_weight()
        matrix = rotation_matrix(config.transform_init, config.hadamard_group_size, packed.codes.device)
        with torch.no_grad():
            return rotate(packed.dequantize(), None if matrix is None else matrix.t()).to(dtype)

    def extra_repr(self) -> str:
        phase = "" if self.quartet_enabled else ", quartet_enabled=False"
        return f"{super().extra_repr()}, {self.quartet_config}{phase}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # The seed is no buffer (DDP would broadcast it, weight averaging would average it), so it moves here.
        super()._apply(fn, recurse)
        device = _seed_device(self.weight)
        if self._quartet_seed.device != device:
            self._quartet_seed = self._quartet_seed.to(device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A view would take the table of all layers with it into every copy or pickle of this one.
        return {**self.__dict__, "_quartet_seed": self._quartet_seed.clone()}


def plain_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``nn.Linear``'s product; float32 masters of a model in bfloat16 are multiplied as the input's dtype."""
    if input.device.type == "meta" or not torch.is_autocast_enabled(input.device.type):
        weight = weight.to(input.dtype)
        bias = None if bias is None else bias.to(input.dtype)
    return F.linear(input, weight, bias)


def quantize_weight(weight: Tensor, config: QuartetConfig) -> MXFP4Tensor:
    """A weight as a layer's forward multiplies it. It may lie on the CPU, before or after a training on a GPU whose
    backend the config names: all backends give the same codes."""
    try:
        backend = select_backend(config.backend, weight.device, weight.dtype).name
    except RuntimeError:
        backend = "reference"
    packed = quantize_mxfp4(weight, config=config, backend=backend)
    assert isinstance(packed, MXFP4Tensor)  # for the type checker
    return packed


def unsupported_shape(in_features: int, out_features: int, config: QuartetConfig) -> str | None:
    """Why a layer of this shape cannot be a QuartetLinear, or ``None``."""
    if in_features % config.rotation_width or in_features == 0:
        return f"in_features is {in_features}, not a multiple of the rotation's group, {config.rotation_width}"
    if out_features % 32 or out_features == 0:
        return f"out_features is {out_features}, not a multiple of 32"
    return None


def become_quartet(linear: nn.Linear, config: QuartetConfig) -> None:
    """Give an ``nn.Linear`` the class QuartetLinear, in place: parameters, hooks and flags stay the same objects."""
    linear.__class__ = QuartetLinear
    assert isinstance(linear, QuartetLinear)  # for the type checker
    linear.quartet_config = config
    linear.quartet_enabled = True
    linear._quartet_step_set = False
    with torch.inference_mode(False):
        linear._quartet_seed = torch.tensor([config.seed, 0, 0], device=_seed_device(linear.weight))
    _Generation.advance()


def become_linear(linear: QuartetLinear) -> None:
    """Undo `become_quartet`."""
    linear.__class__ = nn.Linear  # type: ignore[assignment]
    for name in ("quartet_config", "quartet_enabled", "_quartet_step_set", "_quartet_seed"):
        del linear.__dict__[name]
    _Generation.advance()


MICRO_BATCHES = 2**16
"""What a micro-batch's number is less than."""


def set_quartet_step(module: nn.Module, step: int, micro_batch: int = 0, *, rank: int | None = None) -> None:
    """Tell all QuartetLinear layers of a model where the training is; a plain loop calls it before each forward.

    The random signs (and stochastic rounding) of the backward depend on the config's seed, the layer's number among
    the QuartetLinear layers of ``module``, this step, this micro-batch and the rank, and on nothing else. So call it
    with the same ``module`` each time, and not between a forward under activation checkpointing and its backward, which
    computes it again with what is set then. Lightning users need not: ``QuartetQAT`` and ``QuartetPrecision`` call it.

    Args:
        module: The model.
        step: Number of optimizer steps taken, 0 <= step < 2**32.
        micro_batch: Number of batches since the last optimizer step, 0 <= micro_batch < 2**16.
        rank: Number of this process among those that get other data, 0 <= rank < 2**16; processes that share a batch
            (tensor parallel) have the same. ``None`` means the number in ``torch.distributed``.

    Raises:
        TypeError: If ``module`` is no ``nn.Module``, or a number is no integer.
        ValueError: If a number is out of range, or the module has no QuartetLinear.

    Example:
        ```python
        for step, batch in enumerate(batches):
            set_quartet_step(model, step)
            model(batch).sum().backward()
            optimizer.step()
        ```
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"set_quartet_step needs the nn.Module that was converted, not {type(module).__name__}.")
    if rank is None:
        rank = torch.distributed.get_rank() if _distributed() else 0
    for name, value, limit in (
        ("step", step, 2**32),
        ("micro_batch", micro_batch, MICRO_BATCHES),
        ("rank", rank, 2**16),
    ):
        if not isinstance(value, int):
            raise TypeError(f"set_quartet_step: {name} is {value!r}; it must be an integer.")
        if not 0 <= value < limit:
            raise ValueError(f"set_quartet_step: {name} is {value}; it must be at least 0 and less than {limit}.")
    state = _state_of(module)
    if not state.layers:
        raise ValueError(
            f"set_quartet_step: {type(module).__name__} has no QuartetLinear; call convert_to_quartet(module) first."
        )
    state.set(step, micro_batch, rank)


def unset_quartet_step(module: nn.Module) -> None:
    """At the end of what sets the steps: whoever trains on with nobody to set them is warned."""
    state: _QuartetState | None = module.__dict__.get("_quartet_state")
    if state is not None:
        state.was_set = False
        for layer in state.layers:
            if isinstance(layer, QuartetLinear):
                layer._quartet_step_set = False


def link(module: nn.Module) -> None:
    """Number the QuartetLinear layers of ``module`` and move their seeds into one shared table."""
    _state_of(module)


class _Generation:
    """Counts conversions in this process, so that the layers of a root are listed again only when they may differ."""

    _numbers = count(1)
    current = 0

    @classmethod
    def advance(cls) -> None:
        cls.current = next(cls._numbers)


class _QuartetState:
    """The seeds of one root's layers: row i of a table, int64 [n_layers, 4], is layer i's (layer<<32 | seed, step,
    rank<<16 | micro-batch, unused). One table per device in use; rows are 32 bytes apart, which keeps every layer's
    view aligned alike for compiled code. The root holds it as a plain attribute.
    """

    def __init__(self, root: nn.Module) -> None:
        self.generation = _Generation.current
        self.step, self.micro_batch, self.rank = 0, 0, 0
        self.was_set = False
        self.layers = [module for module in root.modules() if isinstance(module, QuartetLinear)]
        self.link()

    def link(self) -> None:
        devices = [_seed_device(layer.weight) for layer in self.layers]
        with torch.inference_mode(False):  # a table made during trainer.validate() must serve a later fit
            numbers = [(number << 32) | layer.quartet_config.seed for number, layer in enumerate(self.layers)]
            table = torch.zeros(len(self.layers), 4, dtype=torch.int64, device="cpu")  # whatever the default device
            table[:, 0] = torch.tensor(numbers, dtype=torch.int64, device="cpu")
            self.tables = {device: table.to(device, copy=True) for device in set(devices)}
            self.rows = [self.tables[device][i, :3] for i, device in enumerate(devices)]
        for layer, row in zip(self.layers, self.rows, strict=True):
            layer._quartet_seed = row
        self.fill()

    def is_linked(self) -> bool:
        """Whether every layer still has its row: not after a move, a deepcopy, or a link under another root."""
        return len(self.rows) == len(self.layers) and all(
            layer._quartet_seed is row for layer, row in zip(self.layers, self.rows, strict=True)
        )

    def set(self, step: int, micro_batch: int, rank: int) -> None:
        self.step, self.micro_batch, self.rank = step, micro_batch, rank
        if not self.was_set:
            self.was_set = True
            for layer in self.layers:
                layer._quartet_step_set = True
        self.fill()

    def fill(self) -> None:
        for table in self.tables.values():  # fills, not copies: no wait for the device
            table[:, 1].fill_(self.step)
            table[:, 2].fill_((self.rank << 16) | self.micro_batch)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles link anew at their first set_quartet_step.
        return {**self.__dict__, "rows": [], "tables": {}}


def _state_of(root: nn.Module) -> _QuartetState:
    """The state of this root, with every layer linked to it."""
    old: _QuartetState | None = root.__dict__.get("_quartet_state")
    if old is not None and old.generation == _Generation.current and old.is_linked():
        return old
    state = _QuartetState(root)
    if old is not None:
        state.step, state.micro_batch, state.rank = old.step, old.micro_batch, old.rank
    # Not nn.Module.__setattr__: some models refuse or register what they do not know.
    root.__dict__["_quartet_state"] = state
    return state


def forget(root: nn.Module) -> None:
    """Drop the states of a model whose layers are plain again."""
    for module in root.modules():
        module.__dict__.pop("_quartet_state", None)


def _seed_device(weight: Tensor) -> torch.device:
    return torch.device("cpu") if weight.device.type == "meta" else weight.device


def _is_dtensor(weight: Tensor) -> bool:
    return hasattr(weight, "_local_tensor")


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


_warned = False


def _warn_step_never_set(layer: QuartetLinear) -> None:
    """Once in a process: without a step, every backward draws the same signs."""
    global _warned
    if _warned or not layer.training or not draws(layer.quartet_config):
        return
    _warned = True
    warnings.warn(
        "A QuartetLinear runs in training mode, but its step was never set, so every backward draws the same random "
        "bits: use QuartetQAT or QuartetPrecision, or call set_quartet_step(model, step) before each forward.",
        stacklevel=3,
    )
