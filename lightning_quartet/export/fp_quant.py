"""``fp_quant``: what transformers' FPQuantConfig and vLLM load on a Blackwell GPU; rotation and QuEST included."""

from pathlib import Path

import torch
from torch import Tensor

from lightning_quartet.export.folder import write_folder
from lightning_quartet.export.model import ExportedModel
from quartet_kernels import MXFP4Tensor, QuartetConfig
from quartet_kernels.rotation import rotation_matrix

ABS_MAX_GLOBAL_SCALE = 3.0
"""fp-quant's abs_max value is ``code * 2**(byte - 127) / 3``, ours ``code * 2**(byte - 127) * 4/3``."""
ABS_MAX_BYTES = 2


def write_fp_quant(exported: ExportedModel, folder: Path, shard_bytes: int) -> None:
    """``qweight``, ``scales`` (plain rows, not padded), ``weight_global_scale``, ``act_global_scale``,
    ``forward_hadamard_matrix``. No ``backward_hadamard_matrix``: vLLM refuses it and nothing reads it."""
    config, dtype = exported.config, exported.dtype or torch.bfloat16
    abs_max = config.forward_method == "abs_max"
    kept = exported.kept
    for name in exported.layers:
        # transformers compares from the start up to a dot, fp-quant the end.
        for other in kept:
            if name.startswith(f"{other}.") or name.endswith(other):
                raise ValueError(f"Format 'fp_quant' cannot keep {other} out of MXFP4 and not {name}.")

    def tensors(name: str, packed: MXFP4Tensor) -> dict[str, Tensor]:
        scales = packed.scales
        if abs_max:
            scales = torch.where(scales == 0, 0, scales + ABS_MAX_BYTES)
        one = torch.full((1,), ABS_MAX_GLOBAL_SCALE if abs_max else 1.0, dtype=dtype)
        return {
            "qweight": packed.codes,
            "scales": scales,
            "weight_global_scale": one,
            "act_global_scale": one.clone(),
            "forward_hadamard_matrix": hadamard_matrix(config, dtype),
        }

    quantization_config = {
        "quant_method": "fp_quant",
        "forward_dtype": "mxfp4",
        "forward_method": config.forward_method,
        "backward_dtype": "bf16",
        "hadamard_group_size": config.hadamard_group_size,
        "store_master_weights": False,
        "pseudoquantization": False,
        "transform_init": config.transform_init,
        "modules_to_not_convert": kept,
    }
    write_folder(exported, folder, shard_bytes, tensors, quantization_config)


def hadamard_matrix(config: QuartetConfig, dtype: torch.dtype) -> Tensor:
    """The normalised rotation that fp-quant multiplies with, [g, g]."""
    size = config.hadamard_group_size
    matrix = rotation_matrix(config.transform_init, size, torch.device("cpu"))
    return torch.eye(size, dtype=dtype) if matrix is None else (matrix * size**-0.5).to(dtype)
