"""The table of formats: what each can hold, how it is loaded, and what its runtimes leave out."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lightning_quartet.export.auto_round import write_auto_round
from lightning_quartet.export.compressed_tensors import write_compressed_tensors
from lightning_quartet.export.dense import write_dense
from lightning_quartet.export.fp_quant import write_fp_quant
from lightning_quartet.export.gguf import write_gguf
from lightning_quartet.export.model import ExportedModel
from lightning_quartet.export.quartet import write_quartet
from lightning_quartet.export.torchao import write_torchao
from quartet_kernels import QuartetConfig


@dataclass(frozen=True, kw_only=True)
class Format:
    """One row of the table.

    Attributes:
        write: Writes the files of a model into a folder; the last argument is the size of a shard in bytes.
        holds: One line for the help and the model card.
        rotations: The ``transform_init`` that it can hold.
        factor: Whether it can hold the factor 4/3 of ``forward_method="abs_max"``.
        dtype: Of tensors that stay floats, unless another is asked for; ``None`` keeps each one's own.
        activations: What its runtimes can do with a layer's input: the first is the default.
        needs: A package without which it cannot be written.
        load: Python that loads it.
        notes: What a user must know: differences from the trained model, runtimes that ignore something.
    """

    write: Callable[[ExportedModel, Path, int], None]
    holds: str
    rotations: tuple[str, ...] = ("hadamard", "gsr", "identity")
    factor: bool = True
    dtype: torch.dtype | None = torch.bfloat16
    activations: tuple[str, ...]
    needs: str | None = None
    load: str
    notes: tuple[str, ...] = ()

    def refusal(self, config: QuartetConfig) -> str | None:
        """Why this format cannot hold a model of these numerics."""
        if config.transform_init not in self.rotations:
            if self.rotations == ("identity",):
                return (
                    f"has no online rotation, so a model trained with transform_init={config.transform_init!r} would "
                    "load and compute nonsense; train with transform_init='identity', or choose a format that rotates"
                )
            return f"has no rotation {config.transform_init!r}; it has {', '.join(map(repr, self.rotations))}"
        if config.forward_method == "abs_max" and not self.factor:
            return (
                "has power-of-two scales only and cannot hold the factor 4/3 of forward_method='abs_max'; choose "
                "'dense' or 'fp_quant'"
            )
        return None


_AUTO = "from transformers import {auto}\n\nmodel = {auto}.from_pretrained({out!r}{more})"

FORMATS: dict[str, Format] = {
    "quartet": Format(
        write=write_quartet,
        holds="packed weights, rotation and the whole config: for further training of adapters, and inference here",
        dtype=None,
        activations=("trained",),
        load="from lightning_quartet.export import from_pretrained_quartet\n\nmodel = from_pretrained_quartet({out!r})",
        notes=("No other library reads it; export to another format for that.",),
    ),
    "fp_quant": Format(
        write=write_fp_quant,
        holds="weights, rotation and the QuEST or abs-max quantisation of activations",
        activations=("trained",),
        load=_AUTO.replace("{more}", ', device_map="cuda"'),
        notes=(
            "Needs a Blackwell GPU with the packages fp-quant and qutlass; vLLM (compute capability 10 and newer, "
            "bfloat16) wants `--allow-deprecated-quantization`.",
            "SGLang has no loader for it.",
        ),
    ),
    "compressed-tensors": Format(
        write=write_compressed_tensors,
        holds="weights and rotation, for vLLM",
        rotations=("hadamard", "identity"),
        factor=False,
        activations=("none", "abs_max"),
        load="from vllm import LLM\n\nmodel = LLM({out!r})",
        notes=(
            "**transformers ignores `transform_config` silently: a rotated model loads there and computes nonsense.**",
            "vLLM applies transforms without tensor parallelism only, and refuses layers with a bias.",
            "vLLM chooses by GPU: activations in bfloat16 on Ampere and Hopper, in MXFP4 (abs-max) on Blackwell.",
        ),
    ),
    "auto-round": Format(
        write=write_auto_round,
        holds="weights and rotation, activations abs-max: stock transformers with auto-round, also on a CPU",
        rotations=("hadamard", "identity"),
        factor=False,
        activations=("abs_max",),
        load=_AUTO,
        notes=(
            "Needs the package auto-round; on a GPU it quantises inputs with fp-quant's abs-max kernel.",
            "**vLLM reads this format and ignores `rotation_config`: a rotated model computes nonsense there.**",
        ),
    ),
    "dense": Format(
        write=write_dense,
        holds="rotated-back weights in bfloat16, float32 or float16, for any runtime",
        activations=("none",),
        load=_AUTO,
        notes=(
            "Activations are not quantised.",
            "Tensors have the names of transformers 5; earlier versions have others for some models (Mixtral, ViT, "
            "GPT-NeoX).",
        ),
    ),
    "gguf": Format(
        write=write_gguf,
        holds="MXFP4 weights of Llama models, for llama.cpp",
        rotations=("identity",),
        factor=False,
        activations=("none",),
        needs="gguf",
        load=_AUTO.replace("{more}", ', gguf_file="model.gguf"'),
        notes=(
            "llama.cpp quantises activations to 8 bits; transformers dequantises the whole model.",
            "The file has a tokenizer only where that is byte-level BPE that splits texts as GPT-2, SmolLM or Llama 3.",
        ),
    ),
    "torchao": Format(
        write=write_torchao,
        holds="MXFP4 weights as torchao's MXTensor, activations abs-max",
        rotations=("identity",),
        factor=False,
        activations=("abs_max",),
        needs="torchao",
        load=_AUTO,
        notes=("The product is emulated: dequantised and multiplied in bfloat16.",),
    ),
}
"""Every format by name."""
