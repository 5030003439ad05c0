"""``compressed-tensors``: what vLLM loads on any GPU since Ampere; the rotation is a transform applied online."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_quartet.export.folder import write_folder
from lightning_quartet.export.model import ExportedModel
from quartet_kernels import MXFP4Tensor
from quartet_kernels.mxfp4 import GROUP_SIZE
from quartet_kernels.rotation import hadamard

_FORMAT = "mxfp4-pack-quantized"


def write_compressed_tensors(exported: ExportedModel, folder: Path, shard_bytes: int) -> None:
    """``weight_packed``, ``weight_scale``, and ``quartet_input.weight``: the Hadamard matrix of +-1, which the runtime
    divides by its size's root."""
    size = exported.config.hadamard_group_size
    dtype = exported.dtype or torch.bfloat16

    def tensors(name: str, packed: MXFP4Tensor) -> dict[str, Tensor]:
        saved = {"weight_packed": packed.codes, "weight_scale": packed.scales}
        if exported.rotated:
            saved["quartet_input.weight"] = hadamard(size).to(dtype)
        return saved

    scheme = {
        "num_bits": 4,
        "type": "float",
        "strategy": "group",
        "group_size": GROUP_SIZE,
        "symmetric": True,
        "scale_dtype": "torch.uint8",
        "zp_dtype": "torch.uint8",
    }
    inputs = {**scheme, "dynamic": True} if exported.activations == "abs_max" else None
    group = {
        "targets": ["Linear"],
        "weights": {**scheme, "dynamic": False},
        "input_activations": inputs,
        "format": _FORMAT,
    }
    quantization_config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": _FORMAT,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": exported.kept,
    }
    if exported.rotated:
        apply = {"targets": ["Linear"], "location": "input", "inverse": False, "ignore": exported.kept}
        transform = {
            "type": "hadamard",
            "head_dim": size,
            "randomize": False,
            "requires_grad": False,
            "precision": str(dtype),
            "apply": [apply],
        }
        quantization_config["transform_config"] = {"config_groups": {"quartet": transform}}
    write_folder(exported, folder, shard_bytes, tensors, quantization_config)
