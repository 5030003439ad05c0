"""``dense``: every weight rotated back, in bfloat16, float32 or float16; any runtime loads it."""

from pathlib import Path

from torch import Tensor, nn

from lightning_quartet.export.folder import write_folder
from lightning_quartet.export.model import ExportedModel
from quartet_kernels import MXFP4Tensor


def write_dense(exported: ExportedModel, folder: Path, shard_bytes: int) -> None:
    """``weight``: the quantised weight in the unrotated basis."""

    def tensors(name: str, packed: MXFP4Tensor) -> dict[str, Tensor]:
        return {"weight": exported.cast(f"{name}.weight", nn.Parameter(exported.layers[name].dequantized_weight()))}

    write_folder(exported, folder, shard_bytes, tensors, None)
