"""``auto-round``: what stock transformers loads and runs, also on a CPU; the rotation is a hook on the inputs."""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_quartet.export.folder import write_folder
from lightning_quartet.export.model import ExportedModel
from quartet_kernels import MXFP4Tensor
from quartet_kernels.mxfp4 import GROUP_SIZE


def write_auto_round(exported: ExportedModel, folder: Path, shard_bytes: int) -> None:
    """``weight_packed`` and ``weight_scale``; the matrix itself is not in the file.

    Raises:
        ValueError: If the model is rotated and a linear layer other than ``lm_head`` is not in MXFP4, or ``lm_head``
            is: auto-round rotates the inputs of every linear layer but that one. If it has fused experts, or an output
            layer in MXFP4.
    """
    from transformers.quantizers.base import get_keys_to_not_convert

    if exported.experts:
        raise ValueError(
            f"Format 'auto-round' cannot keep the fused experts {exported.experts[0]} out of MXFP4, and transformers "
            "would compute NaN; choose another format."
        )
    odd = [name for name in exported.kept if "lm_head" not in name] + [n for n in exported.layers if "lm_head" in n]
    if exported.rotated and odd:
        raise ValueError(
            f"Format 'auto-round' rotates the inputs of all linear layers but lm_head, and so those of {odd[0]} "
            "otherwise than in training; train with transform_init='identity', or choose another format."
        )

    skipped = get_keys_to_not_convert(exported.model)
    lost = next((name for name in exported.layers if any(re.search(key, name) for key in skipped)), None)
    if lost is not None:
        raise ValueError(
            f"Format 'auto-round' never puts {lost} in MXFP4, an output layer or the last one, and would load random "
            f"weights for it; train with it in modules_to_not_convert, or choose another format."
        )

    def tensors(name: str, packed: MXFP4Tensor) -> dict[str, Tensor]:
        return {"weight_packed": packed.codes, "weight_scale": packed.scales}

    # Layers are replaced by the start of their names, but for those that extra_config takes out.
    blocks = sorted({_block(name) for name in exported.layers})
    inside = [name for name in exported.kept if any(name.startswith(block) for block in blocks)]
    quantization_config: dict[str, Any] = {
        "quant_method": "auto-round",
        "packing_format": "auto_round:llm_compressor",
        "bits": 4,
        "group_size": GROUP_SIZE,
        "sym": True,
        "data_type": "mx_fp",
        "act_bits": 4,
        "act_group_size": GROUP_SIZE,
        "act_sym": True,
        "act_data_type": "mx_fp_rceil",
        "act_dynamic": True,
        "block_name_to_quantize": ",".join(blocks),
        "extra_config": {name: {"bits": 16, "act_bits": 16} for name in inside},
    }
    if exported.rotated:
        quantization_config["rotation_config"] = {
            "block_size": exported.config.hadamard_group_size,
            "hadamard_type": "hadamard",
        }
    write_folder(exported, folder, shard_bytes, tensors, quantization_config)


def _block(name: str) -> str:
    """``model.layers`` of ``model.layers.0.mlp.up_proj``: up to the first number, or the layer itself."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[:number]) or name
