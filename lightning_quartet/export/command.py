"""``lightning-quartet export``: from a checkpoint of a training to a folder that other libraries load."""

import argparse
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quartet.convert import convert
from lightning_quartet.export.api import export_quartet
from lightning_quartet.export.formats import FORMATS
from lightning_quartet.export.reading import build_model, read_config
from quartet_kernels import QuartetConfig
from quartet_kernels.config import RECIPES

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main(argv: Sequence[str]) -> int:
    """Run the command; ``argv`` begins with its name. Returns the exit status."""
    options = _parser().parse_args(argv[1:])
    try:
        with _cleaned_up_when_terminated():
            return _run(options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        sys.stderr.write(f"lightning-quartet export: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("lightning-quartet export: interrupted; nothing was written.\n")
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
        model_folder: A Hugging Face folder; only its config.json is read.
        prefix: What stands before the model's keys in the checkpoint; ``None`` finds it.
        recipe: Name of the numerics of a checkpoint without QuartetQAT's state.
        modules_to_not_convert: As in the training, for such a checkpoint.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the checkpoint cannot be read, does not fit the model, or does not say its numerics.
    """
    content = _read(ckpt)
    saved = _callback_state(content)
    if saved is None:
        if recipe is None:
            raise ValueError(f"{ckpt} does not say how it was trained (it has no QuartetQAT state); pass --recipe.")
        config = QuartetConfig.from_recipe(recipe)
        patterns = modules_to_not_convert
    else:
        if recipe is not None or modules_to_not_convert is not None:
            raise ValueError(f"{ckpt} says itself how it was trained; leave out --recipe and --modules-to-not-convert.")
        config = QuartetConfig.from_dict({**saved["config"], "backend": "auto"})
        patterns = saved.get("modules_to_not_convert")

    state = {key: value for key, value in content["state_dict"].items() if isinstance(value, Tensor)}
    model = build_model(read_config(model_folder), model_folder)
    prefix = _find_prefix(state, model, ckpt) if prefix is None else prefix
    # Packed layers are in the file as codes; patterns are matched against the names that the training saw.
    packed = any(key.endswith(".weight_codes") for key in state)
    config = QuartetConfig.from_dict({**config.to_dict(), "store_master_weights": not packed})
    convert(_under(prefix, model), config, patterns)
    part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    try:
        missing, unexpected = model.load_state_dict(part, strict=False)
    except RuntimeError as error:
        reason = str(error).split("\n\t")[-1].rstrip(".")
        raise ValueError(f"{ckpt} does not fit {model_folder / 'config.json'}: {reason}.") from None
    missing = [key for key in missing if key not in (getattr(model, "all_tied_weights_keys", None) or {})]
    if missing or unexpected:
        what = f"lacks {missing[0]}" if missing else f"has {unexpected[0]}, which the model does not"
        raise ValueError(f"{ckpt} does not fit {model_folder / 'config.json'} under the prefix {prefix!r}: it {what}.")
    return model.eval()


def _read(ckpt: Path) -> dict[str, Any]:
    if not ckpt.is_file():
        hint = "a directory of shards; consolidate it first" if ckpt.is_dir() else "no file"
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
        content = torch.load(ckpt, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises six kinds for damaged and for hostile files
        raise ValueError(
            f"{ckpt} is damaged or holds Python objects that could run code ({type(error).__name__}); save it with "
            "save_weights_only=True, or pass a .safetensors file and --recipe."
        ) from None
    if isinstance(content, dict) and "state_dict" not in content:
        content = {"state_dict": content}
    if not isinstance(content, dict) or not isinstance(content["state_dict"], dict):
        raise ValueError(f"{ckpt} has no state_dict; pass a checkpoint of the Trainer.")
    return content


def _callback_state(content: dict[str, Any]) -> dict[str, Any] | None:
    """QuartetQAT's state in a checkpoint."""
    callbacks = content.get("callbacks")
    for state in callbacks.values() if isinstance(callbacks, dict) else ():
        if isinstance(state, dict) and isinstance(state.get("config"), dict) and "forward_method" in state["config"]:
            return state
    return None


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


def _under(prefix: str, model: nn.Module) -> nn.Module:
    """The model inside modules of the names that the training had."""
    for name in reversed([part for part in prefix.split(".") if part]):
        holder = nn.Module()
        holder.add_module(name, model)
        model = holder
    return model
