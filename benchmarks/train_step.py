"""Tokens per second and peak memory of a training step through the Trainer, MXFP4 against bfloat16.

    python benchmarks/train_step.py --model llama_8b_blocks --json train_step.json

A Llama of transformers from random weights on random tokens: bfloat16 weights (`bf16-true`), fused AdamW, `lm_head` in
bfloat16, every decoder layer compiled in one of torch.compile's modes (`reduce-overhead` replays CUDA graphs) or eager.
The runs of one call share the machine, the data and the initial weights; only their ratio means something.
"""

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_quartet import QuartetQAT
from quartet_kernels import QuartetConfig
from quartet_kernels.files import replacing

MODELS: dict[str, dict[str, int]] = {
    # Four blocks of Llama-3-8B's shape; the vocabulary is cut so that the head does not dominate four blocks.
    "llama_8b_blocks": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama_1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "smollm2_135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
VOCABULARY = 32000
MODES = ("eager", "default", "reduce-overhead")
RUNS: dict[str, QuartetConfig | None] = {
    "bf16": None,
    "quartet": QuartetConfig(),
    "quartet_precise": QuartetConfig(accumulation="precise"),
    "quartet_recompute": QuartetConfig(recompute_inputs=True),
}


class Step(pl.LightningModule):
    """The model, compiled layer by layer, and the times of its steps."""

    def __init__(self, name: str, sequence: int, mode: str) -> None:
        super().__init__()
        config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=sequence, **MODELS[name])  # type: ignore[arg-type]
        config._attn_implementation = "sdpa"
        self.model = LlamaForCausalLM(config).to(torch.bfloat16)
        if mode != "eager":
            for layer in self.model.model.layers:
                layer.compile(mode=mode)
        self.seconds: list[float] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        logits = self.model(input_ids=batch[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def on_train_batch_start(self, batch: Tensor, index: int) -> None:
        if batch.is_cuda:
            torch.cuda.synchronize()
        self._start = time.perf_counter()

    def on_train_batch_end(self, outputs: Any, batch: Tensor, index: int) -> None:
        if batch.is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-5, fused=self.device.type == "cuda")


def measure(
    name: str, batch: int, sequence: int, steps: int, config: QuartetConfig | None, mode: str
) -> dict[str, Any]:
    """Median tokens per second of all but the first half of the steps, and peak memory in GiB."""
    torch._dynamo.reset()
    pl.seed_everything(0, verbose=False)
    model = Step(name, sequence, mode)
    tokens = torch.randint(0, VOCABULARY, (batch * steps, sequence + 1))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer = pl.Trainer(
        devices=1,
        max_steps=steps,
        precision="bf16-true",
        callbacks=[] if config is None else [QuartetQAT(config)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(tokens, batch_size=batch))  # type: ignore[arg-type]
    seconds = statistics.median(model.seconds[steps // 2 :])
    return {
        "tokens/s": batch * sequence / seconds,
        "ms/step": seconds * 1e3,
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else float("nan"),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, nargs="+", default=["llama_8b_blocks", "llama_1b"])
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--sequence", type=int, default=2048, help="tokens a sequence")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--modes", choices=MODES, nargs="+", default=["default"], help="eager, or torch.compile's")
    parser.add_argument(
        "--runs", choices=RUNS, nargs="+", default=list(RUNS), help="the first is what others compare with"
    )
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    options = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    report: list[dict[str, Any]] = []
    for model, mode in itertools.product(options.model, options.modes):
        base = 0.0
        for label in options.runs:
            row = measure(model, options.batch, options.sequence, options.steps, RUNS[label], mode)
            base = base or row["tokens/s"]
            report.append({"model": model, "mode": mode, "run": label, **row, "ratio": row["tokens/s"] / base})
            print(json.dumps(report[-1]), flush=True)
            if options.json:
                with replacing(options.json) as path:
                    path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
