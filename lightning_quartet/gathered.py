"""Weights that FSDP2 gathers as 4-bit codes: 17/32 byte an element go over the wire instead of two or four bytes.

A shard along dim 0 holds whole rows and so whole groups: quantised alone it gives just those rows of the quantised
weight. Each rank keeps a `ShardedWeight`, its rows in high precision; while a layer runs, the layer's
parameter is a `GatheredWeight`, the codes and scales of all rows.

The gradient of a gathered weight leaves the layer in the rotated basis and not clipped. What is missing is linear and
goes row by row, and the shard has its rows: `ShardedWeight.finish_gradient` does it after the reduction, on a
rank's part only, and the clip mask is never sent. Protocol: ``fsdp_pre_all_gather`` and ``fsdp_post_all_gather`` of
``torch.distributed.fsdp.fully_shard``.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_iter, tree_map_only

from quartet_kernels import QuartetConfig, quantize_mxfp4
from quartet_kernels.linear import finish_gradient
from quartet_kernels.mxfp4 import GROUP_SIZE

aten = torch.ops.aten


class ShardedWeight(Tensor):
    """A rank's rows of a weight, float [rows, in_features], which are packed to be gathered.

    Behaves like the plain tensor inside it; only what FSDP2 and ``nn.Module`` do to cut, move and copy a parameter
    keeps this class.

    Args:
        data: The rows.
        out_features: Rows of the whole weight.
        config: The layer's numerics.
    """

    plain: Tensor
    out_features: int
    config: QuartetConfig
    # Of the last projection: what is sent, until the backward sends it again, and the clip mask.
    packed: tuple[Tensor, Tensor] | None = None
    mask: Tensor | None = None
    is_packed: bool = False  # those are of the rows as they are now
    in_backward: bool = False

    @staticmethod
    def __new__(cls, data: Tensor, out_features: int, config: QuartetConfig) -> Self:
        return Tensor._make_wrapper_subclass(
            cls,
            data.shape,
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            device=data.device,
        )

    def __init__(self, data: Tensor, out_features: int, config: QuartetConfig) -> None:
        self.plain, self.out_features, self.config = data, out_features, config

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func._schema.is_mutable:
            for x in tree_iter((args, kwargs or {})):
                if isinstance(x, cls):
                    x.is_packed = False  # another forward of this step must not send the old codes
        example: list[ShardedWeight] = []

        def unwrap(x: "ShardedWeight") -> Tensor:
            example.append(x)
            return x.plain

        plain_args, plain_kwargs = tree_map_only(cls, unwrap, (args, kwargs or {}))
        out = func(*plain_args, **plain_kwargs)
        if func in _IN_PLACE:
            return args[0]
        if func not in _KEEP_CLASS:
            return out
        like = example[0]
        return tree_map_only(Tensor, lambda x: cls(x, like.out_features, like.config), out)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ShardedWeight({self.plain}, out_features={self.out_features}, config={self.config})"

    def finish_gradient(self, gradient: Tensor) -> None:
        """Mask and rotate back, in place, these rows' reduced gradient, float [rows, in_features]."""
        if gradient.numel():
            finish_gradient(gradient, self.mask, self.config)

    # With more parameters FSDP2 would insist on inputs of the shard's own size where rows do not divide evenly.
    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor, ...], None]:
        """The rows to send, as many as the largest shard has: uint8 codes [rows, in_features/2] and scales
        [rows, in_features/32]."""
        packed = self.packed if self.is_packed or self.in_backward else None
        if packed is None:
            packed = self.pack(mesh.size())
        if self.in_backward:
            self.packed = None
            for part in packed:
                if part.is_cuda:
                    part.record_stream(torch.cuda.current_stream())  # FSDP2's, which reads it; another may have made it
        # Of several tensors, FSDP2 copies only the first where there is a single rank.
        return packed if mesh.size() > 1 else (torch.cat([part.view(-1) for part in packed]),), None

    @torch.no_grad()
    def pack(self, ranks: int) -> tuple[Tensor, Tensor]:
        """Project the rows; codes and scales are padded with rows of zeros where other ranks have more."""
        own, width = self.plain.shape
        if own == 0:
            codes, scales = (self.plain.new_empty(0, width // n, dtype=torch.uint8) for n in (2, GROUP_SIZE))
        else:
            clips = self.config.forward_method == "quest"
            found = quantize_mxfp4(self.plain, config=self.config, return_mask=clips, backend=self.config.backend)
            tensor, self.mask = found if isinstance(found, tuple) else (found, None)
            codes, scales = tensor.codes, tensor.scales
        missing = -(-self.out_features // ranks) - own
        if missing:
            codes, scales = F.pad(codes, (0, 0, 0, missing)), F.pad(scales, (0, 0, 0, missing))
        self.packed = codes, scales
        return self.packed

    def fsdp_post_all_gather(
        self, all_gather_outputs: tuple[Tensor, ...], metadata: None, param_dtype: torch.dtype, *, out: Any = None
    ) -> tuple["GatheredWeight", tuple[()]] | None:
        """The whole weight, which reads what was gathered where it lies: FSDP2 frees that and fills it again."""
        if out is not None:
            return None
        width = self.shape[1]
        if len(all_gather_outputs) == 1:
            (both,) = all_gather_outputs
            codes, scales = both.split((both.numel() * 16 // 17, both.numel() // 17))
            codes, scales = codes.view(-1, width // 2), scales.view(-1, width // GROUP_SIZE)
        else:
            codes, scales = (part[: self.out_features] for part in all_gather_outputs)
        return GatheredWeight(codes, scales, param_dtype, self.config), ()


_KEEP_CLASS = {
    aten.detach.default,
    aten.alias.default,
    aten.view.default,
    aten.as_strided.default,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.clone.default,
    aten.new_zeros.default,
    aten.empty_like.default,
    aten._to_copy.default,
    aten._pin_memory.default,
}
_IN_PLACE = {aten.copy_.default}


class GatheredWeight(Tensor):
    """All rows of a weight as packed codes and scales; looks like a float parameter [out_features, in_features].

    A layer passes it to ``quartet_linear`` as ``master``, which gets the gradient; nothing else can be computed with
    it.

    Args:
        codes: uint8 [out_features, in_features/2].
        scales: uint8 [out_features, in_features/32].
        dtype: The dtype it claims, and its gradient has.
        config: The layer's numerics.
    """

    codes: Tensor
    scales: Tensor
    config: QuartetConfig

    @staticmethod
    def __new__(cls, codes: Tensor, scales: Tensor, dtype: torch.dtype, config: QuartetConfig) -> Self:
        shape = (codes.shape[0], codes.shape[1] * 2)
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=codes.device)

    def __init__(self, codes: Tensor, scales: Tensor, dtype: torch.dtype, config: QuartetConfig) -> None:
        self.codes, self.scales, self.config = codes, scales, config

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"GatheredWeight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    # For torch.compile, which looks through the class at the tensors inside.
    def __tensor_flatten__(self) -> tuple[list[str], tuple[torch.dtype, QuartetConfig]]:
        return ["codes", "scales"], (self.dtype, self.config)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], context: tuple[torch.dtype, QuartetConfig], outer_size: Any, outer_stride: Any
    ) -> "GatheredWeight":
        return GatheredWeight(inner["codes"], inner["scales"], *context)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        make: Callable[..., Tensor] | None = _GATHERED_OPS.get(func)
        if make is None:
            raise NotImplementedError(
                f"{func} reads a weight that QuartetFSDP gathered as 4-bit codes, which only QuartetLinear can use; "
                "keep this layer in high precision (modules_to_not_convert) or choose QuartetFSDP(packed=False)."
            )
        return make(*args, **(kwargs or {}))


def _same(weight: GatheredWeight, *args: Any, **kwargs: Any) -> GatheredWeight:
    return GatheredWeight(weight.codes, weight.scales, weight.dtype, weight.config)


def _as_strided(weight: GatheredWeight, size: Any, stride: Any, storage_offset: int | None = None) -> GatheredWeight:
    if tuple(size) != tuple(weight.shape) or tuple(stride) != weight.stride() or storage_offset:
        raise NotImplementedError("A weight that was gathered as 4-bit codes has no other views.")
    return _same(weight)


def _zeros(weight: GatheredWeight, *, dtype: torch.dtype | None = None, **kwargs: Any) -> Tensor:
    return torch.zeros(weight.shape, dtype=dtype or weight.dtype, device=weight.device)


_GATHERED_OPS: dict[Any, Callable[..., Tensor]] = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.as_strided.default: _as_strided,
    aten.zeros_like.default: _zeros,
}
