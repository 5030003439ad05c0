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
    buffer: Tensor | None = None
    mask: Tensor | None = None
    is_packed: bool = False  # the buffer holds the rows as they are now
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
    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor], None]:
        """The rows to send, uint8 [rows of the largest shard, 17/32 in_features]: codes, then scales."""
        buffer = self.buffer if self.is_packed or self.in_backward else None
        if buffer is None:
            buffer = self.pack(mesh.size())
        if self.in_backward:
            self.buffer = None
            if buffer.is_cuda:
                buffer.record_stream(torch.cuda.current_stream())  # FSDP2's, which reads it; another may have made it
        # One tensor: with two, FSDP2 copies only the first where there is a single rank.
        return (buffer,), None

    @torch.no_grad()
    def pack(self, ranks: int) -> Tensor:
        """Project the rows into the buffer."""
        rows = -(-self.out_features // ranks)
        own, width = self.plain.shape
        if own == 0:
            self.buffer = self.plain.new_zeros(rows, width * 17 // 32, dtype=torch.uint8)
            return self.buffer
        clips = self.config.forward_method == "quest"
        found = quantize_mxfp4(self.plain, config=self.config, return_mask=clips, backend=self.config.backend)
        packed, self.mask = found if isinstance(found, tuple) else (found, None)
        sent = torch.cat((packed.codes, packed.scales), dim=1)
        self.buffer = sent if rows == own else F.pad(sent, (0, 0, 0, rows - own))
        return self.buffer

    def fsdp_post_all_gather(
        self, all_gather_outputs: tuple[Tensor], metadata: None, param_dtype: torch.dtype, *, out: Any = None
    ) -> tuple["GatheredWeight", tuple[Tensor, Tensor]] | None:
        """The whole weight; FSDP2 frees its codes and scales with it, and gives it back as ``out`` to be filled."""
        (rows,) = all_gather_outputs
        codes, scales = rows[: self.out_features].split((self.shape[1] // 2, self.shape[1] // GROUP_SIZE), dim=1)
        if out is None:
            # Kernels read codes and scales that lie without gaps.
            codes, scales = codes.contiguous(), scales.contiguous()
            return GatheredWeight(codes, scales, param_dtype, self.config), (codes, scales)
        # The same values are written again, so autograd must not take what it saved in the forward for changed.
        with torch.autograd._unsafe_preserve_version_counter((out.codes, out.scales)):
            out.codes.copy_(codes)
            out.scales.copy_(scales)
        return None


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
