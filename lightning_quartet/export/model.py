"""What every format writes from: a model, its MXFP4 layers, and the rest of its tensors."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quartet.linear import QuartetLinear
from quartet_kernels import MXFP4Tensor, QuartetConfig
from quartet_kernels.mxfp4 import NAN_SCALE

Tensors = Iterable[tuple[str, Tensor]]
Progress = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """A Hugging Face model about to be written.

    Attributes:
        model: The model.
        layers: Its MXFP4 layers by name.
        config: Their numerics, the same for all.
        dtype: Of every tensor that stays a float; ``None`` keeps each one's own.
        activations: ``"none"`` or ``"abs_max"``: what a runtime other than ours is told to do with the inputs.
        source: A folder whose tokenizer files go with the model.
        progress: Wraps the loop over layers.
    """

    model: Any
    layers: dict[str, QuartetLinear]
    config: QuartetConfig
    dtype: torch.dtype | None
    activations: str
    source: Path | None
    progress: Progress

    @property
    def rotated(self) -> bool:
        return self.config.transform_init != "identity"

    @property
    def kept(self) -> list[str]:
        """Names of the linear layers that are not in MXFP4."""
        return [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and name not in self.layers
        ]

    def packed(self, name: str) -> MXFP4Tensor:
        """The rotated weight of a layer, on the CPU.

        Raises:
            ValueError: If it has a group that is not finite.
        """
        weight = self.layers[name].quantized_weight()
        if (weight.scales == NAN_SCALE).any():
            raise ValueError(f"The weight of {name} holds NaN or infinity; export a checkpoint from before that.")
        return MXFP4Tensor(weight.codes.detach().cpu(), weight.scales.detach().cpu(), weight.factor)

    def cast(self, tensor: Tensor) -> Tensor:
        """A tensor that is not in MXFP4, as it is saved."""
        dtype = self.dtype if self.dtype is not None and tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to("cpu", dtype).contiguous()

    def tensors(self, layer_tensors: Callable[[str, MXFP4Tensor], dict[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """All tensors of the file, one layer in memory at a time; those of a layer from ``layer_tensors``."""
        for name in self.progress(list(self.layers)):
            for key, tensor in layer_tensors(name, self.packed(name)).items():
                yield f"{name}.{key}", tensor
            if self.layers[name].bias is not None:
                yield f"{name}.bias", self.cast(self.layers[name].bias)
        yield from self.other_tensors()

    def other_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors outside the MXFP4 layers; one of each that are tied, under the name that a loader ties from."""
        targets = getattr(self.model, "all_tied_weights_keys", None) or {}
        seen: set[int] = set()
        for key, tensor in self.model.state_dict(keep_vars=True).items():
            tied = key in targets and tensor is self.model.get_parameter_or_buffer(targets[key])
            if key.rpartition(".")[0] in self.layers or tied or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            yield key, self.cast(tensor)


def find_model(module: nn.Module) -> Any:
    """The Hugging Face model that a module is or holds.

    Raises:
        TypeError: If there is none.
        ValueError: If there are several.
    """
    from transformers import PreTrainedModel

    if not isinstance(module, nn.Module):
        raise TypeError(f"export_quartet needs a model, not {type(module).__name__}.")
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for child in module.modules():
        if isinstance(child, PreTrainedModel) and child not in inside:
            found.append(child)
            inside.update(child.modules())
    if not found:
        raise TypeError(f"{type(module).__name__} holds no Hugging Face model, which is what can be exported.")
    if len(found) > 1:
        raise ValueError(f"{type(module).__name__} holds {len(found)} Hugging Face models; pass the one to export.")
    return found[0]


def find_layers(model: Any) -> tuple[dict[str, QuartetLinear], QuartetConfig]:
    """The MXFP4 layers of a model and their numerics.

    Raises:
        ValueError: If there are none, their numerics differ, or the model cannot be exported.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuartetLinear)}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no QuartetLinear layers; convert it as it was trained, with "
            "convert_to_quartet(model, config=...), before exporting."
        )
    adapters = next((name for name, _ in model.named_parameters() if ".lora_" in name), None)
    if adapters is not None:
        raise ValueError(
            f"The model has LoRA adapters ({adapters}), which no format of 4-bit weights holds; save them with peft's "
            "save_pretrained and export the base model."
        )
    configs = {_numerics(layer.quartet_config): layer.quartet_config for layer in layers.values()}
    if len(configs) > 1:
        raise ValueError(f"The layers have {len(configs)} different configs; a file holds layers of one config only.")
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name in layers:
        if f"{name}.weight" in {*tied, *tied.values()}:
            raise ValueError(
                f"{name} is in MXFP4 and its weight is tied to another one, which loaders cannot tie again; convert "
                f"the model with modules_to_not_convert={[name]!r}."
            )
    return layers, next(iter(configs.values()))


def _numerics(config: QuartetConfig) -> tuple[Any, ...]:
    return (
        config.forward_method,
        config.statistic,
        config.scale_rule,
        config.transform_init,
        config.hadamard_group_size,
    )
