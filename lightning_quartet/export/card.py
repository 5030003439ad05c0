"""The model card: how the model was trained, how to load it, and what each runtime ignores."""

from pathlib import Path

from lightning_quartet.export.formats import Format
from lightning_quartet.export.model import ExportedModel

_ACTIVATIONS = {
    "trained": "quantised as in training",
    "abs_max": "quantised to MXFP4 by their absolute maximum",
    "none": "not quantised",
}


def write_card(exported: ExportedModel, name: str, row: Format, folder: Path, out: str) -> None:
    """README.md."""
    config, model = exported.config, exported.model
    options = "\n".join(f"| `{key}` | `{value}` |" for key, value in config.to_dict().items())
    auto = "AutoModelForCausalLM" if type(model).__name__.endswith("ForCausalLM") else type(model).__name__
    load = row.load.replace("{auto}", auto).replace("{out!r}", repr(out)).replace("{more}", "")
    notes = "\n".join(f"- {note}" for note in (*_differences(exported, name), *row.notes))
    kept = ", ".join(f"`{layer}`" for layer in exported.kept) or "none"
    (folder / "README.md").write_text(
        f"""---
library_name: transformers
tags: [mxfp4, quartet, quantization-aware-training]
---

# {type(model).__name__}, trained in MXFP4

Trained with MXFP4 matrix products (Quartet, arXiv 2505.14669) by `lightning-quartet` and exported as `{name}`:
{row.holds}.

- Linear layers in MXFP4: {len(exported.layers)}; linear layers kept in high precision: {kept}.
- Inputs of the 4-bit layers in this format: {_ACTIVATIONS[exported.activations]}.

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
        return ["In training the layers' inputs were rotated and quantised to MXFP4 too; here they are not quantised."]
    if exported.activations == "abs_max" and config.forward_method == "quest":
        return [f"In training the layers' inputs were quantised by QuEST ({trained}), here by their absolute maximum."]
    if name == "fp_quant" and config.forward_method == "quest":
        if (config.statistic, config.scale_rule) == ("std", "floor"):
            return ["The runtime computes what the training did, but for ties, which some kernels round the other way."]
        return [
            f"The weights are exactly the trained ones. Inputs were quantised with {trained} in training; the runtime "
            "uses `std` with `floor`, as recipe `fp_quant` does."
        ]
    return ["The runtime computes what the training did."]
