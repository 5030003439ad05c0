"""``torchao``: MXTensor weights, which transformers loads; torchao rotates nothing."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_quartet.export.folder import write_folder
from lightning_quartet.export.model import ExportedModel
from quartet_kernels import MXFP4Tensor
from quartet_kernels.mxfp4 import GROUP_SIZE


def write_torchao(exported: ExportedModel, folder: Path, shard_bytes: int) -> None:
    """``_weight_qdata``, ``_weight_scale`` and torchao's own description of them in the file's metadata."""
    from torchao.prototype.mx_formats.inference_workflow import MXDynamicActivationMXWeightConfig
    from torchao.prototype.mx_formats.mx_tensor import MXTensor, QuantizeTensorToMXKwargs
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization.quantize_.common import KernelPreference
    from transformers import TorchAoConfig

    fp4, dtype = torch.float4_e2m1fn_x2, exported.dtype or torch.bfloat16
    inputs = QuantizeTensorToMXKwargs(
        elem_dtype=fp4, block_size=GROUP_SIZE, kernel_preference=KernelPreference.EMULATED, is_swizzled_scales=False
    )

    def flat(name: str, packed: MXFP4Tensor) -> tuple[dict[str, Tensor], dict[str, str]]:
        scale = packed.scales.view(torch.float8_e8m0fnu)
        weight = MXTensor(packed.codes, scale, fp4, GROUP_SIZE, dtype, KernelPreference.EMULATED, inputs, False)
        return flatten_tensor_state_dict({f"{name}.weight": weight})

    def tensors(name: str, packed: MXFP4Tensor) -> dict[str, Tensor]:
        return {key.removeprefix(f"{name}."): tensor for key, tensor in flat(name, packed)[0].items()}

    # The metadata stands before the tensors: it is made from layers without data.
    names: list[str] = []
    metadata: dict[str, str] = {}
    for name, layer in exported.layers.items():
        codes = torch.empty(layer.out_features, layer.in_features // 2, dtype=torch.uint8, device="meta")
        empty = MXFP4Tensor(codes, codes.new_empty(layer.out_features, layer.in_features // GROUP_SIZE))
        metadata |= {key: text for key, text in flat(name, empty)[1].items() if key != "tensor_names"}
        names.append(f"{name}.weight")
    metadata["tensor_names"] = json.dumps(names)
    config = TorchAoConfig(
        MXDynamicActivationMXWeightConfig(
            activation_dtype=fp4, weight_dtype=fp4, kernel_preference=KernelPreference.EMULATED
        ),
        modules_to_not_convert=exported.kept,
    )
    quantization_config: dict[str, Any] = config.to_dict()
    write_folder(exported, folder, shard_bytes, tensors, quantization_config, metadata)
