"""convert_to_quartet: the one place where ``nn.Linear`` layers become QuartetLinear, and the way back."""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torchmetrics import Metric

from lightning_quartet.linear import QuartetLinear, become_linear, become_quartet, forget, link, unsupported_shape
from lightning_quartet.packed import PackedQuartetLinear, pack_layers
from quartet_kernels import QuartetConfig
from quartet_kernels.linear import FLOAT_DTYPES

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_LORA_ADAPTERS = ("lora_A", "lora_B")
LEFT_ALONE = ("lm_head",)
"""By default, with layers that are tied to an embedding."""


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What `convert_to_quartet` did.

    Attributes:
        converted: Names of the layers that are QuartetLinear now and were not before.
        already_converted: Names of the layers that were before.
        skipped: Name of each linear layer that stays as it is, and the reason.
        unchanged: Name of each layer converted before that would be another now, and why it would.
        config: The numerics of the converted layers.
        share: Of the model's parameters, those in layers that are QuartetLinear now.
    """

    converted: tuple[str, ...]
    already_converted: tuple[str, ...]
    skipped: dict[str, str]
    config: QuartetConfig
    unchanged: dict[str, str] = field(default_factory=dict)
    share: float = 1.0

    def __str__(self) -> str:
        done = len(self.converted) + len(self.already_converted)
        before = f" ({len(self.already_converted)} of them before)" if self.already_converted else ""
        lines = [f"Quartet: {done} of {done + len(self.skipped)} linear layers in MXFP4{before}, {self.config}"]
        for verb, layers in (("kept", self.skipped), ("converted before", self.unchanged)):
            reasons: dict[str, list[str]] = {}
            for name, reason in layers.items():
                reasons.setdefault(reason, []).append(name)
            for reason, names in reasons.items():
                shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
                lines.append(f"  {verb} {shown}: {reason}")
        if self.share < 0.5:
            lines.append(f"  {self.share:.0%} of the model's parameters are in MXFP4: only nn.Linear layers can be")
        return "\n".join(lines)


def convert_to_quartet(
    module: nn.Module,
    *,
    config: QuartetConfig | str | None = None,
    modules_to_not_convert: Sequence[str] | None = None,
    module_filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> ConversionReport:
    """Convert the ``nn.Linear`` layers of a model to QuartetLinear, in place.

    Layers keep their Parameter objects, hooks, flags and device, so optimizers made before stay valid and tied weights
    stay tied. Layers converted before are left alone. Stay as they are, with a reason in the report: layers whose
    sizes do not fit, subclasses of ``nn.Linear`` (they compute something else), ``out_proj`` of
    ``nn.MultiheadAttention``, LoRA adapters (``lora_A``, ``lora_B``), and networks inside metrics.
    ``nn.TransformerEncoderLayer`` gives up its fused evaluation path, which would go around its converted layers.

    Args:
        module: The model, or a single ``nn.Linear``.
        config: The numerics, or the name of a recipe; ``None`` means ``QuartetConfig()``.
        modules_to_not_convert: Patterns of names to leave alone, with all that is inside. A pattern matches a run of
            whole components anywhere in a name (``lm_head`` matches ``model.lm_head``, ``layers.1`` matches
            ``model.layers.1.mlp`` and not ``model.layers.10``); ``*``, ``?`` and ``[...]`` are wildcards.
            ``None`` means ``lm_head`` where there is one, and layers tied to an embedding.
        module_filter_fn: Called as ``module_filter_fn(layer, name)``; a layer is converted only if it returns true.

    Returns:
        What was converted, and what was not and why; ``str(report)`` is a short summary.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a given pattern matches nothing, or no layer is or was converted; the model is unchanged then.
    """
    return convert(module, config, modules_to_not_convert, module_filter_fn)


def revert_from_quartet(module: nn.Module) -> int:
    """Give all QuartetLinear layers of a model the class ``nn.Linear`` again, in place.

    Returns:
        The number of layers reverted.

    Raises:
        TypeError: If ``module`` is no ``nn.Module``.
        ValueError: If a layer got another class since it was converted, as parametrizations give; nothing is reverted.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"revert_from_quartet needs an nn.Module, not {type(module).__name__}.")
    layers = [layer for layer in module.modules() if isinstance(layer, QuartetLinear)]
    revert(module, layers)
    return len(layers)


def resolve_config(config: QuartetConfig | str | None) -> QuartetConfig:
    """A config, a recipe's name, or ``None`` for the default, as a config."""
    if config is None:
        return QuartetConfig()
    if isinstance(config, str):
        return QuartetConfig.from_recipe(config)
    if not isinstance(config, QuartetConfig):
        raise TypeError(f"config is {config!r}; pass a QuartetConfig, the name of a recipe, or None.")
    return config


def resolve_patterns(patterns: Sequence[str] | None) -> tuple[str, ...] | None:
    """Patterns as a tuple, checked."""
    if patterns is None:
        return None
    listed = isinstance(patterns, Iterable) and not isinstance(patterns, str)
    given: tuple[Any, ...] = tuple(patterns) if listed else (None,)
    if not all(isinstance(pattern, str) and pattern for pattern in given):
        raise TypeError(f"modules_to_not_convert is {patterns!r}; pass a list of names such as ['lm_head'], or None.")
    return given


def convert(
    module: nn.Module,
    config: QuartetConfig | str | None = None,
    modules_to_not_convert: Sequence[str] | None = None,
    module_filter_fn: Callable[[nn.Module, str], bool] | None = None,
    *,
    complete: bool = True,
) -> ConversionReport:
    """`convert_to_quartet`; with ``complete=False`` layers may be made later, so having none is no error yet."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"convert_to_quartet needs an nn.Module, not {type(module).__name__}.")
    config = resolve_config(config)
    given = resolve_patterns(modules_to_not_convert)
    names = layer_names(module)
    if complete:
        for pattern in given or ():
            if not any(matches(name, pattern) for aliases in names.values() for name in aliases):
                raise ValueError(
                    f"modules_to_not_convert has {pattern!r}, which matches no module of {type(module).__name__}; "
                    "correct the pattern or leave it out."
                )

    metrics = {inner for metric in names if isinstance(metric, Metric) for inner in metric.modules()}
    embeddings = {inner._parameters.get("weight") for inner in names if isinstance(inner, nn.Embedding)} - {None}
    plan = _Plan(config=config, given=given, filter_fn=module_filter_fn, metrics=metrics, embeddings=embeddings)
    for layer, aliases in names.items():
        if isinstance(layer, nn.Linear):
            plan.add(layer, aliases)
    if complete and not plan.layers and not plan.already_converted:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(plan.skipped.items())[:5])
        raise ValueError(
            f"{type(module).__name__} has no linear layer to convert to MXFP4"
            + (f" ({reasons})" if reasons else " (it has no nn.Linear)")
            + "; change modules_to_not_convert or the sizes of its layers."
        )

    # Everything was checked: from here on nothing fails.
    for layer in plan.layers.values():
        become_quartet(layer, config)
    if plan.layers:
        if not config.store_master_weights:
            pack_layers(layer for layer in plan.layers.values() if isinstance(layer, QuartetLinear))
        link(module)
    _leave_fused_paths(module)
    return ConversionReport(
        converted=tuple(plan.layers),
        already_converted=tuple(plan.already_converted),
        skipped=plan.skipped,
        config=config,
        unchanged=plan.unchanged,
        share=_share(module),
    )


def _share(module: nn.Module) -> float:
    """Of a model's parameters, those that are weights in MXFP4."""
    layers = [layer for layer in module.modules() if isinstance(layer, QuartetLinear)]
    ours = {id(p) for layer in layers for name, p in layer.named_parameters(recurse=False) if name.startswith("weight")}
    others = [p for p in module.parameters() if id(p) not in ours and not nn.parameter.is_lazy(p)]
    inside = sum(layer.in_features * layer.out_features for layer in layers)
    return inside / max(inside + sum(parameter.numel() for parameter in others), 1)


def revert(module: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Revert these layers of the model."""
    ours = [layer for layer in layers if isinstance(layer, QuartetLinear)]
    for layer in ours:
        if type(layer) not in (QuartetLinear, PackedQuartetLinear):
            raise ValueError(
                f"A layer is a {type(layer).__name__} since it was converted and cannot become an nn.Linear again; "
                "undo that first, for example with torch.nn.utils.parametrize.remove_parametrizations."
            )
    restored: dict[nn.Parameter, nn.Parameter] = {}
    for layer in ours:
        if isinstance(layer, PackedQuartetLinear):
            layer.restore_weight(restored)
        become_linear(layer)
    _restore_fused_paths(module)
    if not any(isinstance(layer, QuartetLinear) for layer in module.modules()):
        forget(module)


@dataclass(kw_only=True)
class _Plan:
    """Decides layer by layer, changes nothing."""

    config: QuartetConfig
    given: tuple[str, ...] | None
    filter_fn: Callable[[nn.Module, str], bool] | None
    metrics: set[nn.Module]
    embeddings: set[nn.Parameter | None]
    layers: dict[str, nn.Linear] = field(default_factory=dict)
    already_converted: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    unchanged: dict[str, str] = field(default_factory=dict)

    def add(self, layer: nn.Linear, aliases: list[str]) -> None:
        name = aliases[0] or "(the module itself)"
        if isinstance(layer, QuartetLinear):
            self.already_converted.append(name)
            pattern = self._pattern(aliases, self.given or ())
            if pattern is not None:
                self.unchanged[name] = f"matches {pattern!r}"
            elif layer.quartet_config != self.config:
                self.unchanged[name] = f"keeps {layer.quartet_config}"
            return
        reason = self._reason(layer, aliases)
        if reason is None:
            self.layers[name] = layer
        else:
            self.skipped[name] = reason

    @staticmethod
    def _pattern(aliases: list[str], patterns: Sequence[str]) -> str | None:
        """The first pattern that matches one of a layer's names, or ``None``."""
        return next((pattern for pattern in patterns if any(matches(name, pattern) for name in aliases)), None)

    def _reason(self, layer: nn.Linear, aliases: list[str]) -> str | None:
        """Why a layer stays as it is, or ``None``."""
        pattern = self._pattern(aliases, LEFT_ALONE if self.given is None else self.given)
        if pattern is not None:
            return f"matches {pattern!r}"
        if self.given is None and layer._parameters.get("weight") in self.embeddings:
            return "tied to an embedding"
        if self._pattern(aliases, _LORA_ADAPTERS) is not None:
            return "a LoRA adapter"
        if layer in self.metrics:
            return "part of a torchmetrics Metric, whose network is not trained"
        if isinstance(layer, nn.LazyLinear):
            return "lazy: it has no sizes before the model's first forward"
        if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
            return "nn.MultiheadAttention uses its weight without calling it"
        if type(layer) is not nn.Linear:
            return f"a subclass of nn.Linear ({type(layer).__name__})"
        if "forward" in layer.__dict__:
            return "its forward was replaced on the instance"
        if layer.weight.dtype not in FLOAT_DTYPES:
            return f"its weight is {layer.weight.dtype}"
        if not self.config.store_master_weights and "weight" not in layer._parameters:
            return "its weight is computed from other parameters, so there is nothing to pack"
        reason = unsupported_shape(layer.in_features, layer.out_features, self.config)
        if reason is None and self.filter_fn is not None and not self.filter_fn(layer, aliases[0]):
            return "left out by module_filter_fn"
        return reason


def layer_names(root: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module with all its names (a shared module has several), without the components that wrappers add."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in root.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(without_wrappers(name))
    return names


def converted_before(root: nn.Module, layers: Collection[nn.Module]) -> list[dict[str, Any]]:
    """What a checkpoint must say of layers that others converted: names by config, as plain values."""
    groups: dict[QuartetConfig, list[str]] = {}
    for module, names in layer_names(root).items():
        if module in layers and isinstance(module, QuartetLinear):
            groups.setdefault(module.quartet_config, []).append(names[0])
    return [{"config": config.to_dict(), "layers": names} for config, names in groups.items()]


def trained_as(config: QuartetConfig, patterns: Sequence[str] | None, before: list[dict[str, Any]]) -> dict[str, Any]:
    """What a checkpoint says of how its layers were trained, as plain values; ``export`` reads it."""
    listed = None if patterns is None else [*patterns]
    return {"config": config.to_dict(), "modules_to_not_convert": listed, "converted_before": before}


# How it is computed or kept, not what: may change between runs.
_NOT_NUMERICS = ("backend", "accumulation", "store_master_weights", "recompute_inputs")


def warn_of_changes(saved: dict[str, Any], mine: dict[str, Any], kind: str) -> None:
    """Warn where a checkpoint's state, with what `trained_as` gave, differs from that of a ``kind`` now."""
    old, new = saved["config"], mine["config"]
    numerics = [name for name in {**new, **old} if name not in _NOT_NUMERICS]
    options = [name for name in ("modules_to_not_convert", "start_step", "end_step") if name in saved and name in mine]
    for what, names, before, now in (("QuartetConfig", numerics, old, new), (kind, options, saved, mine)):
        changed = [
            f"{name}: {before.get(name)!r} in the checkpoint, {now.get(name)!r} now"
            for name in names
            if before.get(name) != now.get(name)
        ]
        if changed:
            rank_zero_warn(f"The checkpoint was trained with another {what} ({'; '.join(changed)}).")


def without_wrappers(name: str) -> str:
    """A name without the components that ``torch.compile``, activation checkpointing and FSDP add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern matches a run of whole components anywhere in a name, or as wildcards the whole name."""
    parts, wanted = name.split("."), pattern.split(".")
    runs = (parts[i : i + len(wanted)] for i in range(len(parts) - len(wanted) + 1))
    return fnmatchcase(name, pattern) or any(all(map(fnmatchcase, run, wanted)) for run in runs)


# In evaluation nn.TransformerEncoderLayer calls one fused operation on the weights of its linear1 and linear2, and
# nn.TransformerEncoder makes nested tensors for it: validation would silently run without quantisation. Both look at
# one attribute that has no other use.
_FUSED_PATH_SWITCH: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu"),
    (nn.TransformerEncoder, "use_nested_tensor"),
)


def _leave_fused_paths(root: nn.Module) -> None:
    for module in root.modules():
        for kind, switch in _FUSED_PATH_SWITCH:
            if isinstance(module, kind) and _has_quartet(module) and "_quartet_fused_path" not in module.__dict__:
                module.__dict__["_quartet_fused_path"] = getattr(module, switch, 0)
                setattr(module, switch, 0)


def _restore_fused_paths(root: nn.Module) -> None:
    for module in root.modules():
        for kind, switch in _FUSED_PATH_SWITCH:
            if isinstance(module, kind) and "_quartet_fused_path" in module.__dict__ and not _has_quartet(module):
                setattr(module, switch, module.__dict__.pop("_quartet_fused_path"))


def _has_quartet(module: nn.Module) -> bool:
    return any(isinstance(child, QuartetLinear) for child in module.modules())
