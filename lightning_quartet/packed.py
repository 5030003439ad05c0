"""Packed weights: QuartetLinear layers that keep 4-bit codes and scales instead of a master weight."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn

from lightning_quartet.linear import QuartetLinear, _is_dtensor, _warn_step_never_set, plain_linear, quantize_weight
from quartet_kernels import MXFP4Tensor, QuartetConfig, quartet_linear
from quartet_kernels.mxfp4 import GROUP_SIZE
from quartet_kernels.ops import forward_factor


class PackedQuartetLinear(QuartetLinear):
    """A QuartetLinear whose weight is packed MXFP4: 17/32 byte an element, frozen; made by `pack_quartet`.

    The forward is bit for bit that of the layer it was packed from (without gradients, on a GPU, up to 32 tokens take
    another kernel: the same codes, another order of sums), and the input gets its gradient in MXFP4 or
    bfloat16, so adapters train on top of it. State dict keys: ``weight_codes`` uint8 [out_features, in_features/2]
    (two E2M1 codes a byte, low nibble first), ``weight_scales`` uint8 [out_features, in_features/32] (E8M0), both of
    the *rotated* weight, ``bias`` where there is one, and ``_extra_state`` (uint8 text, such as ``quest hadamard 32``),
    without which codes are taken for those of the layer's config. Loading a state dict with ``weight`` packs that.

    Attributes:
        weight: The codes as int8, as in other quantised layers, for code that asks for a weight's device or dtype
            (T5 casts its activations to that of any weight that is not int8); see `dequantized_weight` for the matrix.
    """

    weight_codes: nn.Parameter
    weight_scales: nn.Parameter
    _quartet_dtype: torch.dtype

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.weight_codes.view(torch.int8)

    def forward(self, input: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``, in the input's dtype or autocast's."""
        if not self.quartet_enabled:
            return plain_linear(input, self.dequantized_weight(input.dtype), self.bias)
        if not torch.compiler.is_compiling() and not self._quartet_step_set and input.requires_grad:
            _warn_step_never_set(self)
        return quartet_linear(
            input, self.quantized_weight(), self.bias, config=self.quartet_config, seed=self._quartet_seed
        )

    def quantized_weight(self) -> MXFP4Tensor:
        return MXFP4Tensor(self.weight_codes, self.weight_scales, forward_factor(self.quartet_config))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, packed"

    def restore_weight(self, restored: dict[nn.Parameter, nn.Parameter]) -> None:
        """Before the layer becomes an ``nn.Linear`` again; layers that share codes, in ``restored``, share a weight."""
        codes = self.weight_codes
        if codes not in restored:
            with torch.inference_mode(False):
                restored[codes] = nn.Parameter(self.dequantized_weight(self._quartet_dtype))
        for name in ("weight_codes", "weight_scales"):
            del self._parameters[name]
        del self.__dict__["_quartet_dtype"]
        self._parameters["weight"] = restored[codes]

    def get_extra_state(self) -> Tensor:
        """What the codes mean, for a state dict: ASCII text as uint8."""
        return torch.tensor(list(_meaning(self.quartet_config).encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing to do: `_load_from_state_dict` has compared it."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        # What the weight's dtype would be after model.to(dtype): a layer that is reverted later goes with the others.
        self._quartet_dtype = fn(torch.empty(0, dtype=self._quartet_dtype, device=self.weight_codes.device)).dtype
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = [f"{prefix}{name}" for name in ("weight", "weight_codes", "weight_scales")]
        master, codes = state_dict.get(names[0]), state_dict.get(names[1])
        if master is not None and codes is None:  # a checkpoint of the training
            if tuple(master.shape) != (self.out_features, self.in_features) or not master.is_floating_point():
                error_msgs.append(
                    f"{names[0]} is {master.dtype} {tuple(master.shape)}; it must be float "
                    f"{(self.out_features, self.in_features)} to be packed."
                )
                return
            packed = _quantize(state_dict.pop(names[0]), self.quartet_config)
            state_dict.update({names[1]: packed.codes, names[2]: packed.scales})
        text = state_dict.get(f"{prefix}_extra_state")
        if not isinstance(text, Tensor):  # a file may go without; torch.distributed.checkpoint has a placeholder then
            text = state_dict[f"{prefix}_extra_state"] = self.get_extra_state()
        meaning = bytes(text.flatten().tolist()).decode("ascii", "replace")
        if meaning != _meaning(self.quartet_config):
            error_msgs.append(
                f"{names[1]} holds codes of {meaning!r} and the layer computes with {_meaning(self.quartet_config)!r} "
                "(forward_method, transform_init, hadamard_group_size); give the layer the config it was packed with."
            )
            return
        for name in names[1:]:
            if name in state_dict and state_dict[name].dtype != torch.uint8:  # copying would cast it silently
                error_msgs.append(f"{name} is {state_dict[name].dtype}; packed weights are torch.uint8.")
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def pack_quartet(module: nn.Module) -> int:
    """Replace the weights of all QuartetLinear layers of a model by packed 4-bit codes and scales, in place.

    Each master weight is freed as soon as its layer is packed, if nothing else (an optimizer, a tied embedding) holds
    it. Layers that share a weight share its packed form. Undone by
    `revert_from_quartet`, whose ``nn.Linear`` layers get the dequantised weight.

    Args:
        module: A converted model, on any device (also ``meta``).

    Returns:
        The number of layers packed now.

    Raises:
        TypeError: If ``module`` is no ``nn.Module``.
        ValueError: If it has no QuartetLinear, or one whose weight is sharded over several devices or computed from
            other parameters (pruning, weight normalisation); nothing is packed then.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"pack_quartet needs an nn.Module, not {type(module).__name__}.")
    layers = [layer for layer in module.modules() if isinstance(layer, QuartetLinear)]
    if not layers:
        raise ValueError(
            f"pack_quartet: {type(module).__name__} has no QuartetLinear; call convert_to_quartet(module) first."
        )
    return pack_layers(layers)


def pack_layers(layers: Iterable[QuartetLinear]) -> int:
    """`pack_quartet` for these layers."""
    groups: dict[int, list[QuartetLinear]] = {}  # by the weight's id: holding it here would keep it from being freed
    for layer in layers:
        if isinstance(layer, PackedQuartetLinear):
            continue
        if "weight" not in layer._parameters:
            raise ValueError(
                f"pack_quartet: the weight of a {type(layer).__name__} is computed from other parameters, as pruning "
                "and weight normalisation do; undo that first, for example with torch.nn.utils.prune.remove."
            )
        if _is_dtensor(layer.weight):
            raise ValueError(
                "pack_quartet: a weight is a DTensor, sharded over several devices; pack the model before it is "
                "sharded, or load a consolidated checkpoint."
            )
        groups.setdefault(id(layer.weight), []).append(layer)
    for group in groups.values():
        _pack(group)
    return sum(map(len, groups.values()))


def _pack(layers: list[QuartetLinear]) -> None:
    """Pack layers that share one weight."""
    by_config: dict[QuartetConfig, tuple[nn.Parameter, nn.Parameter]] = {}
    for layer in layers:
        config = dataclasses.replace(layer.quartet_config, store_master_weights=False)
        if config not in by_config:
            packed = _quantize(layer.weight.detach(), config)
            by_config[config] = (nn.Parameter(packed.codes, False), nn.Parameter(packed.scales, False))
        dtype = layer._parameters.pop("weight").dtype  # type: ignore[union-attr]
        layer.__class__ = PackedQuartetLinear
        assert isinstance(layer, PackedQuartetLinear)  # for the type checker
        layer.quartet_config, layer._quartet_dtype = config, dtype
        layer.weight_codes, layer.weight_scales = by_config[config]
        # The order of nn.Linear's own parameters: weight, then bias.
        layer._parameters["bias"] = layer._parameters.pop("bias")


def _quantize(weight: Tensor, config: QuartetConfig) -> MXFP4Tensor:
    with torch.inference_mode(False), torch.no_grad():
        if weight.device.type == "meta":
            rows, columns = weight.shape
            codes = torch.empty(rows, columns // 2, dtype=torch.uint8, device="meta")
            return MXFP4Tensor(codes, codes.new_empty(rows, columns // GROUP_SIZE), forward_factor(config))
        return quantize_weight(weight, config)


def _meaning(config: QuartetConfig) -> str:
    """The options that a packed weight cannot be read without."""
    return f"{config.forward_method} {config.transform_init} {config.rotation_width}"
