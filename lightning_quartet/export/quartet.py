"""``quartet``: our own format, the packed layers as they are; read by ``from_pretrained_quartet``."""

from pathlib import Path

from torch import Tensor

from lightning_quartet.export.folder import write_folder
from lightning_quartet.export.model import ExportedModel
from quartet_kernels import MXFP4Tensor


def write_quartet(exported: ExportedModel, folder: Path, shard_bytes: int) -> None:
    """``weight_codes``, ``weight_scales``: the state dict of `PackedQuartetLinear`."""

    def tensors(name: str, packed: MXFP4Tensor) -> dict[str, Tensor]:
        return {"weight_codes": packed.codes, "weight_scales": packed.scales}

    config = {**exported.config.to_dict(), "store_master_weights": False, "backend": "auto"}
    quantization_config = {"quant_method": "quartet", "config": config, "modules": list(exported.layers)}
    write_folder(exported, folder, shard_bytes, tensors, quantization_config)
