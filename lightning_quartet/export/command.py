"""``lightning-quartet export``: from a checkpoint of a training to a folder that other libraries load."""

import argparse
import signal
import sys
import threading
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quartet.convert import LEFT_ALONE, convert, layer_names, matches, resolve_patterns, without_wrappers
from lightning_quartet.export.api import export_quartet
from lightning_quartet.export.formats import FORMATS
from lightning_quartet.export.reading import build_model, read_config, read_generation_config
from quartet_kernels import QuartetConfig
from quartet_kernels.config import RECIPES

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(argv: Sequence[str]) -> int:
    """Run the command; ``argv`` begins with its name. Returns the exit status."""
    options = _parser().parse_args(argv[1:])
    try:
        with _cleaned_up_when_terminated():
            return _run(options)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        sys.stderr.write(f"lightning-quartet export: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("lightning-quartet export: interrupted.\n")
        return 130


def _run(options: argparse.Namespace) -> int:
    model = load_checkpoint(options.ckpt, options.model, options.prefix, options.recipe, options.modules_to_not_convert)
    out = export_quartet(
        model,
        options.format,
        options.out,
        dtype=_DTYPES.get(options.dtype),
        activations=options.activations,
        source=options.model,
        overwrite=options.overwrite,
    )
    sys.stdout.write(f"{out}\n")
    return 0


@contextmanager
def _cleaned_up_when_terminated() -> Iterator[None]:
    """Let SIGTERM raise, so that temporary folders go."""
    if threading.current_thread() is not threading.main_thread():  # Python allows no handlers there
        yield
        return

    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    formats = "\n".join(f"  {name:<19} {row.holds}" for name, row in FORMATS.items())
    parser = argparse.ArgumentParser(
        prog="lightning-quartet export",
        description=f"Export a trained model.\n\nformats:\n{formats}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ckpt", required=True, type=Path, help="checkpoint of the Trainer, or a .safetensors file")
    parser.add_argument("--model", required=True, type=Path, help="Hugging Face folder: config.json and tokenizer")
    parser.add_argument("--format", required=True, choices=FORMATS, help="see above")
    parser.add_argument("--out", required=True, type=Path, help="folder to make")
    parser.add_argument("--prefix", help="what stands before the model's keys in the checkpoint; found by itself")
    parser.add_argument("--recipe", choices=RECIPES, help="numerics, where the checkpoint does not say them")
    parser.add_argument(
        "--modules-to-not-convert",
        nargs="*",
        metavar="NAME",
        help="as in the training, where the checkpoint does not say it; default: lm_head",
    )
    parser.add_argument("--dtype", choices=_DTYPES, help="of all that is not in MXFP4")
    parser.add_argument("--activations", choices=("none", "abs_max"), help="what compressed-tensors runtimes do")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export")
    return parser


def load_checkpoint(
    ckpt: Path,
    model_folder: Path,
    prefix: str | None = None,
    recipe: str | None = None,
    modules_to_not_convert: Sequence[str] | None = None,
) -> Any:
    """The converted Hugging Face model of a training's checkpoint.

    Args:
        ckpt: A checkpoint of the Trainer (read with ``weights_only=True``: no code in it is run) or safetensors.
        model_folder: A Hugging Face folder; only its config.json and generation_config.json are read.
        prefix: What stands before the model's keys in the checkpoint; ``None`` finds it.
        recipe: Name of the numerics of a checkpoint without the state of QuartetQAT or QuartetPrecision.
        modules_to_not_convert: As in the training, for such a checkpoint.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the checkpoint cannot be read, does not fit the model, does not say its numerics, or was not
            trained in MXFP4 to the end.
    """
    content = _read(ckpt)
    saved = _saved_state(content, ckpt, recipe, modules_to_not_convert)
    state = {
        without_wrappers(key): value
        for key, value in content["state_dict"].items()
        if isinstance(key, str) and isinstance(value, Tensor)
    }
    del content
    adapter = next((key for key in state if ".lora_" in key or ".base_layer." in key), None)
    if adapter is not None:
        raise ValueError(
            f"{ckpt} has LoRA or other adapters ({adapter}), which no format of 4-bit weights holds; save them with "
            "peft's save_pretrained and export a checkpoint of the base model."
        )
    model = build_model(read_config(model_folder), model_folder, len(state))
    read_generation_config(model, model_folder)
    if prefix is None:
        prefix = _find_prefix(state, model, ckpt)
        _check_head(state, model, prefix, ckpt)
    elif prefix and not prefix.endswith("."):
        prefix += "."
    # Packed layers are in the file as codes; patterns are matched against the names that the training saw.
    packed = any(key.endswith(".weight_codes") for key in state)
    trained = _under(prefix, model)
    for layers in saved["converted_before"]:
        _convert(trained, layers["config"], packed, [], set(layers["layers"]))
    patterns, of_command = saved["modules_to_not_convert"], recipe is not None
    if patterns is None and (tied := _tied(trained, state)):
        patterns, of_command = [*LEFT_ALONE, *tied], False
    if patterns is not None and not of_command:  # the training has checked them; some may name what is not exported
        names = [name for aliases in layer_names(trained).values() for name in aliases]
        patterns = [
            pattern for pattern in resolve_patterns(patterns) or () if any(matches(name, pattern) for name in names)
        ]
    _convert(trained, saved["config"], packed, patterns)
    part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    _load(model, part, prefix, ckpt, model_folder)
    left = [key for key in state if not key.startswith(prefix)]
    if left:
        sys.stderr.write(f"lightning-quartet export: left out {len(left)} tensors outside {prefix!r}: {left[0]}...\n")
    return model.eval()


def _tied(model: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """Linear layers that a training tied to an embedding, whatever the model's config says: its checkpoint holds one
    tensor for the two."""

    def addresses(kind: type[nn.Module]) -> dict[str, int]:
        names = [name for name, module in model.named_modules() if isinstance(module, kind)]
        return {name: state[f"{name}.weight"].data_ptr() for name in names if f"{name}.weight" in state}

    embeddings = set(addresses(nn.Embedding).values())
    return [name for name, address in addresses(nn.Linear).items() if address in embeddings]


def _convert(
    model: nn.Module, options: dict[str, Any], packed: bool, patterns: Any, layers: set[str] | None = None
) -> None:
    config = QuartetConfig.from_dict({**options, "backend": "auto", "store_master_weights": not packed})
    convert(
        model, config, patterns, None if layers is None else lambda _, name: name in layers, complete=layers is None
    )


def _load(model: Any, part: dict[str, Tensor], prefix: str, ckpt: Path, model_folder: Path) -> None:
    for key, own in model.state_dict(keep_vars=True).items():
        if key in part and own.is_floating_point():
            if not part[key].is_floating_point():  # copying would cast it silently
                raise ValueError(f"{key} of {ckpt} is {part[key].dtype}; it must be a floating-point tensor.")
            own.data = own.data.to(part[key].dtype)  # a model made from config.json is in float32
    try:
        missing, unexpected = model.load_state_dict(part, strict=False)
    except RuntimeError as error:
        reason = str(error).split("\n\t")[-1].rstrip(".")
        raise ValueError(f"{ckpt} does not fit {model_folder / 'config.json'}: {reason}.") from None
    missing = [key for key in missing if key not in (getattr(model, "all_tied_weights_keys", None) or {})]
    if missing or unexpected:
        what = f"lacks {missing[0]}" if missing else f"has {unexpected[0]}, which the model does not"
        raise ValueError(f"{ckpt} does not fit {model_folder / 'config.json'} under the prefix {prefix!r}: it {what}.")


def _read(ckpt: Path) -> dict[str, Any]:
    if not ckpt.is_file():
        shards = ckpt.is_dir() and ckpt != Path()  # which an empty string is
        hint = "a directory of shards; consolidate it first" if shards else "no file"
        raise FileNotFoundError(f"--ckpt {ckpt} is {hint}.")
    if ckpt.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return {"state_dict": load_file(ckpt)}
        except SafetensorError as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise ValueError(f"{ckpt} is truncated or no safetensors file ({reason}).") from None
    try:
        # From the file as they are needed, where its format allows: a checkpoint holds the optimizer's states too.
        content = torch.load(ckpt, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(ckpt))
    except Exception as error:  # torch raises six kinds for damaged and for hostile files
        raise ValueError(
            f"{ckpt} is damaged or holds Python objects that could run code ({type(error).__name__}); keep them out of "
            "it with save_hyperparameters(ignore=[...]), or pass its state dict as .safetensors and --recipe."
        ) from None
    if isinstance(content, dict) and "state_dict" not in content:
        content = {"state_dict": content}
    if not isinstance(content, dict) or not isinstance(content["state_dict"], dict):
        raise ValueError(f"{ckpt} has no state_dict; pass a checkpoint of the Trainer.")
    return content


def _saved_state(
    content: dict[str, Any], ckpt: Path, recipe: str | None, patterns: Sequence[str] | None
) -> dict[str, Any]:
    """How a checkpoint was trained: ``config``, ``modules_to_not_convert``, ``converted_before``."""
    callbacks = content.get("callbacks")
    states = [*(callbacks.values() if isinstance(callbacks, dict) else ()), content.get("QuartetPrecision")]
    for saved in states:
        if not isinstance(saved, dict) or not isinstance(saved.get("config"), dict):
            continue
        if "forward_method" not in saved["config"]:
            continue
        if recipe is not None or patterns is not None:
            raise ValueError(f"{ckpt} says itself how it was trained; leave out --recipe and --modules-to-not-convert.")
        _check_phase(saved, content.get("global_step"), ckpt)
        return {"modules_to_not_convert": None, "converted_before": [], **saved}
    if recipe is None:
        raise ValueError(
            f"{ckpt} does not say how it was trained (no state of QuartetQAT or QuartetPrecision); pass --recipe."
        )
    config = QuartetConfig.from_recipe(recipe).to_dict()
    return {"config": config, "modules_to_not_convert": patterns, "converted_before": []}


def _check_phase(saved: dict[str, Any], steps: Any, ckpt: Path) -> None:
    start, end = saved.get("start_step", 0), saved.get("end_step")
    last = steps - 1 if isinstance(steps, int) and steps > 0 else saved.get("step") or 0
    if last < start or (end is not None and last >= end):
        raise ValueError(
            f"{ckpt} ends with step {last}, which trained in high precision (start_step={start}, end_step={end}), so "
            "its weights are not for MXFP4; export a checkpoint whose last step was in MXFP4."
        )


def _find_prefix(state: dict[str, Tensor], model: nn.Module, ckpt: Path) -> str:
    """The one prefix under which every parameter of the model is in the checkpoint."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    names = [name for name, _ in model.named_parameters() if name not in tied]
    known = {key.removesuffix("_codes") for key in state}
    candidates = {key.removesuffix(names[0]) for key in known if key.endswith(names[0])}
    found = sorted(prefix for prefix in candidates if all(f"{prefix}{name}" in known for name in names))
    if len(found) != 1:
        what = f"several: {', '.join(map(repr, found))}" if found else "none"
        raise ValueError(
            f"{ckpt} should hold the keys of {type(model).__name__} under one prefix, and there is {what}; pass "
            "--prefix, or the --model that was trained."
        )
    return found[0]


def _check_head(state: dict[str, Tensor], model: Any, prefix: str, ckpt: Path) -> None:
    """Refuse to leave out silently what a larger class of transformers has around the same base model."""
    base = f"{model.base_model_prefix}."
    if model.base_model is not model or base == "." or not f".{prefix}".endswith(f".{base}"):
        return
    outer = prefix.removesuffix(base)
    head = next((key for key in state if key.startswith(outer) and not key.startswith(prefix)), None)
    if head is not None:
        raise ValueError(
            f"{ckpt} has {head}, a head that {type(model).__name__} does not have; pass as --model a folder whose "
            "config.json names the class that was trained, as model.save_pretrained writes it (or leave the head out "
            f"with --prefix {prefix})."
        )


def _under(prefix: str, model: nn.Module) -> nn.Module:
    """The model inside modules of the names that the training had."""
    for name in reversed([part for part in prefix.split(".") if part]):
        holder = nn.Module()
        holder.add_module(name, model)
        model = holder
    return model
