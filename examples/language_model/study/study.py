"""Paired training runs: what each choice of numerics costs in loss, against a baseline that shares everything else.

    python examples/language_model/study/study.py --runs bf16 quartet fp_quant --seeds 3 --steps 700 --out study

Runs of one seed share initial weights, data order and the signs of the backward's rotations, so their difference is far
smaller than the spread between seeds. The table gives the mean difference of the training loss over the last 50 steps,
and of the validation loss, from the first run named, with the standard error over seeds. Results are appended to
OUT/runs.json after every run; a run that is there already is not repeated.

The model is the paper's 30M Llama (arXiv 2505.14669, Table 4: 6 layers, 640 wide, 5 heads, sequence 512) with its
optimizer settings; the text is any file of documents, by default the State of the Union addresses.
"""

import argparse
import json
import logging
import math
import os
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lightning_quartet import QuartetQAT
from lightning_quartet.recipes import CausalLM, TextDataModule
from quartet_kernels import QuartetConfig

LAYERS = 6
RUNS: dict[str, dict[str, Any] | None] = {
    "bf16": None,
    "quartet": {},
    "precise": {"accumulation": "precise"},
    "fast": {"accumulation": "fast"},
    "rms_nearest": {"scale_rule": "nearest"},
    "fp_quant": {"statistic": "std", "scale_rule": "floor"},
    "stochastic": {"backward_rounding": "stochastic"},
    "no_signs": {"randomize_backward": False},
    "mxfp8_backward": {"backward_dtype": "mxfp8"},
    "bf16_backward": {"backward_dtype": "bf16"},
    "abs_max": {"forward_method": "abs_max"},
    "end_85": {"end": 0.85},
    "end_95": {"end": 0.95},
    "ends_in_bf16": {"skip": [f"layers.{index}" for index in (0, LAYERS - 1)]},
}
"""What each run changes: options of QuartetConfig, `end` (fraction of steps after which layers compute in bf16) and
`skip` (modules that are not converted)."""

LOSSES = 50


class Losses(pl.Callback):
    """Keeps every training loss on the device, without waiting for it."""

    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, *rest: Any) -> None:
        self.values.append(outputs["loss"].detach())


def train(run: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One training run: its mean loss over the last steps, its validation loss, and its speed."""
    pl.seed_everything(seed, verbose=False)
    data = TextDataModule(
        path=str(options.text),
        vocabulary_size=options.vocabulary,
        sequence_length=options.sequence,
        batch_size=options.batch,
        validation_documents=options.validation_documents,
    )
    model = CausalLM(
        config={
            "vocab_size": options.vocabulary,
            "hidden_size": options.width,
            "intermediate_size": options.width * 14 // 5,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": options.width // 128,
            "num_key_value_heads": options.width // 128,
            "max_position_embeddings": options.sequence,
            "tie_word_embeddings": False,
        },
        learning_rate=options.learning_rate,
        warmup_steps=options.steps // 10,
    )
    losses = Losses()
    callbacks: list[pl.Callback] = [losses]
    changes = RUNS[run]
    if changes is not None:
        changes = dict(changes)
        end, skip = changes.pop("end", None), changes.pop("skip", None)
        callbacks.append(
            QuartetQAT(
                QuartetConfig(**changes, seed=seed),
                modules_to_not_convert=None if skip is None else ["lm_head", *skip],
                end_step=None if end is None else round(end * options.steps),
            )
        )
    trainer = pl.Trainer(
        devices=1,
        max_steps=options.steps,
        max_epochs=-1,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    start = time.perf_counter()
    trainer.fit(model, datamodule=data)
    seconds = time.perf_counter() - start
    validate = pl.Trainer(
        devices=1,
        precision="bf16-mixed",
        callbacks=[callback for callback in callbacks if isinstance(callback, QuartetQAT)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=options.validation_batches,
    )
    (metrics,) = validate.validate(model, datamodule=data, verbose=False)
    history = torch.stack(losses.values).float().tolist()
    return {
        "run": run,
        "seed": seed,
        "train_loss": statistics.mean(history[-LOSSES:]),
        "val_loss": metrics["val_loss"],
        "tokens/s": options.steps * options.batch * options.sequence / seconds,
        "losses": [round(value, 4) for value in history[:: max(1, len(history) // 100)]],
        **{
            name: getattr(options, name)
            for name in ("steps", "batch", "sequence", "width", "vocabulary", "learning_rate")
        },
        "text": options.text.name,
    }


def table(results: list[dict[str, Any]], runs: list[str]) -> str:
    """Mean difference from the first run and its standard error over the seeds that both have."""
    found = {(result["run"], result["seed"]): result for result in results}
    lines = ["| run | pairs | train loss | difference | val loss | difference |", "|---|---|---|---|---|---|"]
    for run in runs:
        seeds = sorted(seed for name, seed in found if name == run and (runs[0], seed) in found)
        if not seeds:
            continue
        cells = []
        for metric in ("train_loss", "val_loss"):
            values = [found[run, seed][metric] for seed in seeds]
            gaps = [found[run, seed][metric] - found[runs[0], seed][metric] for seed in seeds]
            error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else float("nan")
            cells += [f"{statistics.mean(values):.4f}", f"{statistics.mean(gaps):+.4f} ± {error:.4f}"]
        lines.append(f"| {run} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", nargs="+", choices=RUNS, default=["bf16", "quartet"], help="the first is the baseline"
    )
    parser.add_argument("--seeds", type=int, default=3, help="pairs")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch", type=int, default=128, help="sequences a step")
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--learning_rate", type=float, default=1.2e-3)
    parser.add_argument("--text", type=Path, default=Path(__file__).parents[1] / "sotu.txt.xz")
    parser.add_argument("--validation_documents", type=int, default=20)
    parser.add_argument("--validation_batches", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_float32_matmul_precision("high")

    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "runs.json"
    results: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    for seed in range(options.seeds):
        for run in options.runs:
            if any(result["run"] == run and result["seed"] == seed for result in results):
                continue
            results.append(train(run, seed, options))
            temporary = file.with_suffix(".tmp")
            temporary.write_text(json.dumps(results, indent=1) + "\n")
            os.replace(temporary, file)
            last = {
                name: value for name, value in results[-1].items() if name in ("train_loss", "val_loss", "tokens/s")
            }
            print(run, seed, ", ".join(f"{name} {value:.5g}" for name, value in last.items()), flush=True)
    print(table(results, options.runs))


if __name__ == "__main__":
    main()
