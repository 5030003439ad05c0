"""A folder that ``from_pretrained`` understands."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_quartet.export.files import copy_tokenizer, write_json, write_tensors
from lightning_quartet.export.model import ExportedModel
from quartet_kernels import MXFP4Tensor

LayerTensors = Callable[[str, MXFP4Tensor], dict[str, Tensor]]


def write_folder(
    exported: ExportedModel,
    folder: Path,
    shard_bytes: int,
    layer_tensors: LayerTensors,
    quantization_config: dict[str, Any] | None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Sharded safetensors, config.json, generation config and tokenizer."""
    # The small files first: what is wrong with them is said before gigabytes are written.
    write_config(exported, folder, quantization_config)
    copy_tokenizer(exported.source, folder)
    write_tensors(folder, exported.tensors(layer_tensors), shard_bytes, metadata)


def write_config(exported: ExportedModel, folder: Path, quantization_config: dict[str, Any] | None) -> None:
    """config.json and generation_config.json.

    Raises:
        ValueError: If the generation config contradicts itself.
    """
    config = copy.deepcopy(exported.model.config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    values = config.to_dict()
    # A config.json that names code to load would need that code beside it.
    values.pop("auto_map", None)
    values.pop("_name_or_path", None)  # a path of this machine
    values["architectures"] = [exported.architecture]
    if exported.dtype is not None:
        values["dtype"] = str(exported.dtype).removeprefix("torch.")
    elif not isinstance(values.get("dtype"), str):
        values["dtype"] = str(exported.model.dtype).removeprefix("torch.")
    if quantization_config is not None:
        values["quantization_config"] = quantization_config
    write_json(folder / "config.json", values)
    if exported.model.can_generate():
        try:
            exported.model.generation_config.save_pretrained(folder)
        except ValueError as error:
            reason = str(error).strip().replace("\n", " ").rstrip(".")
            raise ValueError(f"The model's generation_config is not valid and must be corrected: {reason}.") from None
