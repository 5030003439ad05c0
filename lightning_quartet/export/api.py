"""export_quartet: checks first, then one of the formats' functions, into a folder that appears whole or not at all."""

import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from lightning_quartet.export.card import write_card
from lightning_quartet.export.files import MARKER, SHARD_BYTES, new_folder, write_json
from lightning_quartet.export.formats import FORMATS
from lightning_quartet.export.model import ExportedModel, find_layers, find_model

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def export_quartet(
    model: nn.Module,
    format: str,
    out: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    activations: Literal["none", "abs_max"] | None = None,
    source: str | os.PathLike | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: bool = True,
) -> Path:
    """Write a trained model as a folder that other libraries load; the folder appears whole or not at all.

    Args:
        model: A Hugging Face model with QuartetLinear layers, packed or not, or a module (a LightningModule) that
            holds one.
        format: A name of `FORMATS`.
        out: The folder to make.
        dtype: float32, bfloat16 or float16 of all that is not in MXFP4; ``None`` means the format's default:
            bfloat16, and each tensor's own for ``"quartet"``.
        activations: What the runtime does with the inputs of 4-bit layers, where the format leaves a choice
            (``"compressed-tensors"``: ``"none"``, the default, or ``"abs_max"``).
        source: A folder whose tokenizer is copied; ``None`` means the folder that the model was loaded from.
        overwrite: Replace an earlier export.
        shard_bytes: Size at which another safetensors file is begun.
        progress: Show a progress bar on a terminal.

    Returns:
        The folder.

    Raises:
        TypeError: If the module holds no Hugging Face model, or an argument has the wrong type.
        ValueError: If there is no such format, or it cannot hold this model: it would lose the rotation, say, or
            adapters, or the model is not finite, sharded or in a high-precision phase.
        FileExistsError: If ``out`` exists, also when it appears meanwhile, or is the working directory.
        OSError: If the files cannot be written: the disk is full, say.
        ImportError: If the format needs a package that is not installed.

    Example:
        ```python
        export_quartet(module, "auto-round", "exported/auto-round")
        ```
    """
    row = FORMATS.get(format)
    if row is None:
        raise ValueError(f"There is no format {format!r}; choose one of {', '.join(map(repr, FORMATS))}.")
    if dtype is not None and dtype not in _DTYPES:
        raise ValueError(f"dtype is {dtype}; choose float32, bfloat16 or float16.")
    if activations is not None and activations not in row.activations:
        raise ValueError(
            f"Format {format!r} cannot do activations={activations!r}; it can {', '.join(map(repr, row.activations))}."
        )
    if row.needs is not None and importlib.util.find_spec(row.needs) is None:
        raise ImportError(f"Format {format!r} is written with the package {row.needs}: pip install {row.needs}.")
    found = find_model(model)
    layers, config = find_layers(found)
    if refusal := row.refusal(config):
        raise ValueError(f"Format {format!r} {refusal}.")
    folder = _source(found, source)

    def bar(names: Iterable[Any]) -> Iterable[Any]:
        console = Console(stderr=True)
        return track(names, f"Writing {format}", console=console, transient=True, disable=not console.is_terminal)

    exported = ExportedModel(
        model=found,
        layers=layers,
        config=config,
        dtype=dtype or row.dtype,
        activations=activations or row.activations[0],
        source=folder,
        progress=bar if progress else lambda names: names,
    )
    exported.check_names(read_back=format == "quartet")
    with new_folder(out, overwrite) as staging, torch.no_grad():
        row.write(exported, staging, shard_bytes)
        write_card(exported, format, row, staging, Path(os.path.abspath(out)).name)
        write_json(staging / MARKER, {"version": 1, "format": format, "config": config.to_dict()})
    return Path(out)


def _source(model: Any, source: str | os.PathLike | None) -> Path | None:
    if source is not None:
        if not Path(source).is_dir():
            raise FileNotFoundError(f"source is {os.fspath(source)!r}, which is no directory.")
        return Path(source)
    loaded_from = getattr(model.config, "name_or_path", "")
    return Path(loaded_from) if loaded_from and Path(loaded_from).is_dir() else None
