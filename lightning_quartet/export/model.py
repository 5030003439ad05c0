"""What every format writes from: a model, its MXFP4 layers, and the rest of its tensors."""

import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quartet.convert import layer_names, without_wrappers
from lightning_quartet.linear import QuartetLinear, _is_dtensor
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
        activations: ``"none"``, ``"abs_max"`` or ``"trained"``: what a runtime other than ours is told to do with
            the inputs.
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
            for module, names in layer_names(self.model).items()
            for name in names
            if isinstance(module, nn.Linear) and name not in self.layers
        ]

    @property
    def experts(self) -> list[str]:
        """Names of the parameters that hold the weights of several experts; they are never in MXFP4."""
        return [key for key, tensor in _rest(self) if tensor.dim() == 3 and "experts" in key.split(".")]

    @property
    def of_transformers(self) -> bool:
        """Whether the class that a loader makes is one of transformers."""
        return transformers_class(self.model).__module__.partition(".")[0] == "transformers"

    def computed_buffers(self) -> Iterator[Tensor]:
        """Float buffers that no file holds."""
        saved = self.model.state_dict().keys()
        for key, tensor in self.model.named_buffers():
            if key not in saved and tensor.is_floating_point():
                yield tensor

    @property
    def architecture(self) -> str:
        """The class that a loader makes."""
        return transformers_class(self.model).__name__

    def packed(self, name: str) -> MXFP4Tensor:
        """The rotated weight of a layer, on the CPU.

        Raises:
            ValueError: If it has a group that is not finite.
        """
        weight = self.layers[name].quantized_weight()
        if (weight.scales == NAN_SCALE).any():
            raise ValueError(f"The weight of {name} holds NaN or infinity; export a checkpoint from before that.")
        return MXFP4Tensor(weight.codes.detach().cpu(), weight.scales.detach().cpu(), weight.factor)

    def cast(self, key: str, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor that is not in MXFP4, as it is saved: in ``dtype``, else in that of the export.

        Raises:
            ValueError: If it is a parameter that is not finite in its new dtype.
        """
        dtype = dtype or self.dtype
        dtype = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        saved = tensor.detach().to("cpu", dtype).contiguous()
        if isinstance(tensor, nn.Parameter) and not saved.isfinite().all():  # buffers may be infinite: masks
            raise ValueError(
                f"{key} holds NaN or infinity as {dtype}; export a checkpoint from before that, or with another dtype."
            )
        return saved

    def tensors(self, layer_tensors: Callable[[str, MXFP4Tensor], dict[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """All tensors of the file, one layer in memory at a time; those of a layer from ``layer_tensors``."""
        for name in self.progress(list(self.layers)):
            for key, tensor in layer_tensors(name, self.packed(name)).items():
                yield f"{name}.{key}", tensor
            if self.layers[name].bias is not None:
                yield f"{name}.bias", self.cast(f"{name}.bias", self.layers[name].bias)
        yield from self.other_tensors()

    def other_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors outside the MXFP4 layers; of those that a loader ties, only the one that it ties from."""
        targets = getattr(self.model, "all_tied_weights_keys", None) or {}
        rest = dict(_rest(self))
        for key, tensor in rest.items():
            if key not in targets or rest.get(targets[key]) is not tensor:
                yield key, self.cast(key, tensor)

    def check_names(self, read_back: bool) -> None:
        """Refuse what a loader would not find, or not look for.

        Args:
            read_back: Whether `from_pretrained_quartet` is to read the folder.

        Raises:
            ValueError: If the names of the tensors are not those of a new model of this class and config, or the class
                is not of transformers where it has to be.
        """
        from transformers.initialization import no_init_weights

        kind = transformers_class(self.model)
        if not self.of_transformers:
            if read_back:
                raise ValueError(
                    f"from_pretrained_quartet makes only classes of transformers, not {kind.__name__}; choose another "
                    "format, or keep a checkpoint."
                )
            return  # a user's own architecture, whose constructor may do anything
        with torch.device("meta"), no_init_weights():
            expected = set(kind(copy.deepcopy(self.model.config)).state_dict())
        layers = self.layers.items()
        names = {f"{name}.weight" for name in self.layers} | {f"{n}.bias" for n, m in layers if m.bias is not None}
        names |= {key for key, _ in _rest(self)}
        if names != expected:
            odd = min(names ^ expected)
            what = f"has {odd}, which a new one has not" if odd in names else f"lacks {odd}, which a new one has"
            raise ValueError(
                f"This {type(self.model).__name__} {what}, so that loaders would compute something else; merge or "
                f"remove adapters and parametrizations, and make its config say what a {kind.__name__} like it has."
            )


def _rest(exported: ExportedModel) -> Iterator[tuple[str, Tensor]]:
    """All tensors outside the MXFP4 layers, by the names that they have without wrappers."""
    for key, tensor in exported.model.state_dict(keep_vars=True).items():
        name = without_wrappers(key)
        if isinstance(tensor, Tensor) and name.rpartition(".")[0] not in exported.layers:
            yield name, tensor


def transformers_class(model: nn.Module) -> Any:
    """The model's class, or for a user's subclass the nearest one that transformers has."""
    import transformers

    for kind in type(model).__mro__:
        known = getattr(transformers, kind.__name__, None) is kind and issubclass(kind, transformers.PreTrainedModel)
        if known and not kind.__name__.endswith("PreTrainedModel"):
            return kind
    return type(model)


def find_model(module: nn.Module) -> Any:
    """The Hugging Face model that a module is or holds.

    Raises:
        TypeError: If there is none.
        ValueError: If there are several, or it has adapters of peft.
    """
    from transformers import PreTrainedModel

    if not isinstance(module, nn.Module):
        raise TypeError(f"export_quartet needs a model, not {type(module).__name__}.")
    if any(kind.__name__ == "PeftModel" for child in module.modules() for kind in type(child).__mro__):
        raise ValueError(
            "The model has adapters of peft (LoRA, prompts or others), which no format of 4-bit weights holds; save "
            "them with peft's save_pretrained and export the base model, or merge them first (merge_and_unload)."
        )
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
    layers = {n: m for m, names in layer_names(model).items() if isinstance(m, QuartetLinear) for n in names}
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no QuartetLinear layers; convert it as it was trained, with "
            "convert_to_quartet(model, config=...), before exporting."
        )
    if any(map(_is_dtensor, model.parameters())):
        raise ValueError(
            "A weight is a DTensor, sharded over several devices; export the model of a consolidated checkpoint."
        )
    off = next((name for name, layer in layers.items() if not layer.quartet_enabled), None)
    if off is not None:
        raise ValueError(
            f"{off} computes in high precision (quartet_enabled is False, a phase of the training without MXFP4), and "
            "no format holds that; set it to True in all layers if their weights are to be used in MXFP4."
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
