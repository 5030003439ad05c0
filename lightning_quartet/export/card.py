"""The model card: how the model was trained, how to load it, and what each runtime ignores."""

from pathlib import Path

import torch

from lightning_quartet.export.formats import Format
from lightning_quartet.export.model import ExportedModel

_ACTIVATIONS = {
    "trained": "quantised as in training",
    "abs_max": "quantised to MXFP4 by their absolute maximum",
    "none": "not quantised",
}
_QUEST = "quantised by QuEST with `std` and `floor`, otherwise than in training"


def write_card(exported: ExportedModel, name: str, row: Format, folder: Path, out: str) -> None:
    """README.md."""
    config = exported.config
    options = "\n".join(f"| `{key}` | `{value}` |" for key, value in config.to_dict().items())
    auto = exported.architecture
    auto = "AutoModelForCausalLM" if auto.endswith("ForCausalLM") else auto
    load = row.load
    if not exported.of_transformers:
        load = load.replace("from transformers import {auto}", "# {auto} is a class of whoever trained the model")
    load = load.replace("{auto}", auto).replace("{out!r}", repr(out)).replace("{more}", "")
    listed = [*_differences(exported, name), *row.notes]
    if name == "dense" and exported.rotated:
        listed.append(
            "The weights lie on no MXFP4 grid: quantising this folder to 4 bits again loses accuracy; export the "
            "packed weights instead."
        )
    if any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in exported.computed_buffers()):
        listed.append(
            "The training held buffers that are not saved (rotary frequencies, say) in 16 bits; loaders compute them "
            "in float32, which shows in long sequences."
        )
    notes = "\n".join(f"- {note}" for note in listed)
    kept = ", ".join(f"`{layer}`" for layer in (*exported.kept, *exported.experts)) or "none"
    inputs = _QUEST if name == "fp_quant" and _other_quest(exported) else _ACTIVATIONS[exported.activations]
    (folder / "README.md").write_text(
        f"""---
library_name: transformers
tags: [mxfp4, quartet, quantization-aware-training]
---

# {exported.architecture}, trained in MXFP4

Trained with MXFP4 matrix products (Quartet, arXiv 2505.14669) by `lightning-quartet` and exported as `{name}`:
{row.holds}.

- Linear layers in MXFP4: {len(exported.layers)}; linear layers and experts kept in high precision: {kept}.
- Inputs of the 4-bit layers in this format: {inputs}.

## Load it

```python
{load}
```

## What to know

{notes}

## Training configuration

| option | value |
|---|---|
{options}
""",
        encoding="utf-8",
    )


def _differences(exported: ExportedModel, name: str) -> list[str]:
    """What a runtime of this format computes otherwise than the training did."""
    config = exported.config
    trained = f"`{config.statistic}` with scale rule `{config.scale_rule}`"
    if exported.activations == "none":
        how = "rotated and quantised" if exported.rotated else "quantised"
        notes = [f"In training the layers' inputs were {how} to MXFP4 too; here they are not quantised."]
        if name == "gguf" and any(layer.bias is not None for layer in exported.layers.values()):
            notes.append("**The model has biases, which transformers' GGUF reader drops silently.**")
        return notes
    if exported.activations == "abs_max" and config.forward_method == "quest":
        return [f"In training the layers' inputs were quantised by QuEST ({trained}), here by their absolute maximum."]
    if name == "fp_quant" and config.forward_method == "quest":
        if not _other_quest(exported):
            return ["The runtime computes what the training did, but for ties, which some kernels round the other way."]
        return [
            f"The weights are exactly the trained ones. Inputs were quantised with {trained} in training; the runtime "
            "uses `std` with `floor`, as recipe `fp_quant` does."
        ]
    return ["The runtime computes what the training did."]


def _other_quest(exported: ExportedModel) -> bool:
    """Whether fp-quant's kernel quantises inputs otherwise than the training did."""
    config = exported.config
    return config.forward_method == "quest" and (config.statistic, config.scale_rule) != ("std", "floor")
