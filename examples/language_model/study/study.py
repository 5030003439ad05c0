"""Paired training runs: what each choice of numerics costs in loss, against a baseline that shares everything else.

    python examples/language_model/study/prepare.py
    python examples/language_model/study/study.py --runs bf16 quartet fp_quant --seeds 3 --out runs/study

Runs of one seed share initial weights, data order and the signs of the backward's rotations, so their difference is far
smaller than the spread between seeds. The table gives the mean difference of the training loss over the last 50 steps,
and of the validation loss, from the first run named, with the standard error over seeds.

Results are added to OUT/runs.json after every run; a run that is there already is not repeated, so a call that was
interrupted goes on, and several processes with different --runs may share a GPU and a folder (then their tokens per
second say little).

The model is the paper's 30M Llama (arXiv 2505.14669, Table 4: 6 layers, 640 wide, 5 heads, sequence 512) with its
optimizer settings and a batch of 65,536 tokens; the text is what prepare.py makes.
"""

import argparse
import contextlib
import logging
import math
import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

import quartet_kernels.linear
from lightning_quartet import QuartetQAT
from lightning_quartet.recipes import CausalLM
from lightning_quartet.recipes.results import Result, add_result, read_results
from quartet_kernels import QuartetConfig

LAYERS = 6
RUNS: dict[str, dict[str, Any]] = {
    "bf16": {"mxfp4": False},
    "bf16_lr_2x": {"mxfp4": False, "learning_rate": 2.0},
    "quartet": {},
    "quartet_lr_2x": {"learning_rate": 2.0},
    "bf16_lr_half": {"mxfp4": False, "learning_rate": 0.5},
    "quartet_lr_half": {"learning_rate": 0.5},
    "bf16_to_zero": {"mxfp4": False, "final_learning_rate": 0.0},
    "quartet_to_zero": {"final_learning_rate": 0.0},
    "bf16_ema": {"mxfp4": False, "ema": 0.99},
    "quartet_ema": {"ema": 0.99},
    "hadamard_64": {"hadamard_group_size": 64},
    "hadamard_128": {"hadamard_group_size": 128},
    "gsr_128": {"hadamard_group_size": 128, "transform_init": "gsr"},
    "precise": {"accumulation": "precise"},
    "fast": {"accumulation": "fast"},
    "rms_nearest": {"scale_rule": "nearest"},
    "fp_quant": {"statistic": "std", "scale_rule": "floor"},
    "stochastic": {"backward_rounding": "stochastic"},
    "no_signs": {"randomize_backward": False},
    "no_mask": {"mask": False},
    "mxfp8_backward": {"backward_dtype": "mxfp8"},
    "bf16_backward": {"backward_dtype": "bf16"},
    "abs_max": {"forward_method": "abs_max"},
    "end_85": {"end": 0.85},
    "end_95": {"end": 0.95},
    "ends_in_bf16": {"skip": [f"layers.{index}" for index in (0, LAYERS - 1)]},
}
"""What each run changes: options of QuartetConfig, `mxfp4` (whether there is any), `end` (fraction of steps after which
layers compute in bf16), `skip` (modules that are not converted), `mask` (whether clipped elements get no gradient),
`learning_rate` (a factor), `final_learning_rate` (of the last step, as a fraction), and `ema` (decay of the moving
average of the weights that is validated). `abs_max` clips nothing, so it has no mask either."""

LOSSES = 50
SETTINGS = ("steps", "batch", "sequence", "width", "learning_rate", "validation_batches", "eager")


class Batches:
    """Batches `[batch, sequence + 1]` of int64 token ids from one tensor on the model's device."""

    def __init__(self, tokens: Tensor, sequence: int, batch: int, order: Tensor) -> None:
        self.windows = tokens.unfold(0, sequence + 1, sequence)
        self.parts = order.to(tokens.device).split(batch)

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[Tensor]:
        return (self.windows[part].long() for part in self.parts)


class Student(CausalLM):
    """The recipe, with layers and loss compiled, and its losses kept on the device, without waiting for them."""

    def __init__(self, eager: bool, **options: Any) -> None:
        super().__init__(compile_layers=not eager, **options)
        self.losses: list[Tensor] = []
        self.head = _head if eager else torch.compile(_head)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.losses.append(loss.detach())
        if batch_idx in (self.trainer.max_steps // 2, self.trainer.max_steps - 1):
            self.losses[-1].item()  # waits for the device
            self.times = [*getattr(self, "times", []), time.perf_counter()]
        return loss

    def on_train_batch_end(self, *arguments: Any) -> None:
        """Logs nothing."""

    def _loss(self, batch: Tensor, reduction: str = "mean") -> Tensor:
        hidden = self.model.get_decoder()(input_ids=batch[:, :-1], use_cache=False).last_hidden_state
        return self.head(hidden, self.model.get_output_embeddings().weight, batch[:, 1:])


def _head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(linear(hidden, weight).flatten(0, 1).float(), targets.flatten())


def read_tokens(file: Path) -> tuple[Tensor, Tensor, dict[str, str]]:
    """Training and validation tokens, int32 on the GPU where there is one, and where they come from."""
    if not file.is_file():
        raise SystemExit(f"There is no {file}: make it with examples/language_model/study/prepare.py.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with safe_open(file, "pt", device=device) as found:
        train, validation = (found.get_tensor(name).int() for name in ("train", "validation"))
        return train, validation, found.metadata()


@contextlib.contextmanager
def without_masks() -> Iterator[None]:
    """Gradients pass clipped elements: what the layers' configuration has no option for, since it is not the method."""
    project = quartet_kernels.linear._project
    quartet_kernels.linear._project = lambda x, config, mask: project(x, config, False)
    try:
        yield
    finally:
        quartet_kernels.linear._project = project


def train(run: str, seed: int, options: argparse.Namespace) -> Result:
    """One training run: its mean loss over the last steps, its validation loss, and its speed."""
    pl.seed_everything(seed, verbose=False)
    train_tokens, validation_tokens, about = read_tokens(options.tokens)
    data = {"tokens": about["source"], "train_tokens": len(train_tokens)}
    file = options.out / "runs.json"
    if any({**data, **result}[name] != data[name] for result in read_results(file) for name in data):
        raise SystemExit(f"{file} holds runs with other tokens than those of {options.tokens}: give another --out.")
    sequences, others = ((len(tokens) - 1) // options.sequence for tokens in (train_tokens, validation_tokens))
    held_out = options.validation_batches * options.batch
    if sequences == 0 or others < held_out:
        raise SystemExit(
            f"{options.tokens} holds {sequences} sequences of {options.sequence} tokens to train with, and {others} of "
            f"the {held_out} to validate with: prepare more, or name fewer --validation_batches."
        )
    shuffle = torch.Generator().manual_seed(seed)
    epochs = math.ceil(options.steps * options.batch / sequences)
    order = torch.cat([torch.randperm(sequences, generator=shuffle) for _ in range(epochs)])
    order = order[: options.steps * options.batch]
    batches = Batches(train_tokens, options.sequence, options.batch, order)
    validation = Batches(validation_tokens, options.sequence, options.batch, torch.arange(held_out))
    changes = dict(RUNS[run])
    model = Student(
        options.eager,
        config={
            "vocab_size": int(about["vocabulary"]),
            "hidden_size": options.width,
            "intermediate_size": options.width * 14 // 5 // 32 * 32,  # so that all is converted
            "num_hidden_layers": LAYERS,
            "num_attention_heads": options.width // 128,
            "num_key_value_heads": options.width // 128,
            "max_position_embeddings": options.sequence,
            "tie_word_embeddings": False,
        },
        learning_rate=options.learning_rate * changes.pop("learning_rate", 1.0),
        final_learning_rate=changes.pop("final_learning_rate", 0.1),
        warmup_steps=options.steps // 10,
    )
    callbacks: list[pl.Callback] = []
    if (decay := changes.pop("ema", None)) is not None:
        callbacks.append(EMAWeightAveraging(decay=decay))
    masked = changes.pop("mask", True)
    if changes.pop("mxfp4", True):
        end, skip = changes.pop("end", None), changes.pop("skip", None)
        callbacks.append(
            QuartetQAT(
                QuartetConfig(**changes, seed=seed),
                modules_to_not_convert=None if skip is None else ["lm_head", *skip],
                end_step=None if end is None else round(end * options.steps),
            )
        )
    common: dict[str, Any] = {
        "devices": 1,
        "precision": "bf16-mixed",
        "callbacks": callbacks,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(max_steps=options.steps, max_epochs=1, gradient_clip_val=1.0, **common)
    with contextlib.nullcontext() if masked else without_masks():
        trainer.fit(model, batches)
    with torch.compiler.set_stance("force_eager"):  # for a few batches, compiling anew does not pay
        (metrics,) = pl.Trainer(**common).validate(model, validation, verbose=False)
    history = torch.stack(model.losses).float().tolist()
    timed = options.steps - 1 - options.steps // 2
    return {
        "run": run,
        "seed": seed,
        "train_loss": statistics.mean(history[-LOSSES:]),
        "val_loss": metrics["val_loss"],
        "tokens/s": timed * options.batch * options.sequence / (model.times[-1] - model.times[0]),
        "losses": [round(value, 4) for value in history[:: max(1, len(history) // 100)]],
        "settings": settings(options),
        **data,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    }


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """What paired runs must have in common."""
    return {name: getattr(options, name) for name in SETTINGS}


def differences(results: list[Result], run: str, baseline: str, metric: str) -> list[float]:
    """Of a run from the baseline, one for each seed that both have."""
    found = {(result["run"], result["seed"]): result[metric] for result in results}
    seeds = sorted(seed for name, seed in found if name == run and (baseline, seed) in found)
    return [found[run, seed] - found[baseline, seed] for seed in seeds]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """The mean and its standard error, NaN for one value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error


def table(results: list[Result], runs: list[str]) -> str:
    """Mean difference from the first run and its standard error over the seeds that both have."""
    lines = ["| run | pairs | train loss | difference | val loss | difference |", "|---|---|---|---|---|---|"]
    for run in runs:
        cells = []
        for metric in ("train_loss", "val_loss"):
            gaps = differences(results, run, runs[0], metric)
            if gaps:
                mean, error = mean_and_error(gaps)
                own = statistics.mean(result[metric] for result in results if result["run"] == run)
                cells += [f"{own:.4f}", f"{mean:+.4f} ± {error:.4f}"]
        if cells:
            lines.append(f"| {run} | {len(gaps)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--runs", nargs="+", choices=RUNS, default=["bf16", "quartet"], help="the first is the baseline"
    )
    parser.add_argument("--seeds", type=int, default=3, help="pairs; 0 only prints what is there")
    parser.add_argument("--first_seed", type=int, default=0, help="to add pairs, or to share them out over GPUs")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--batch", type=int, default=128, help="sequences a step")
    parser.add_argument("--sequence", type=int, default=512)
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--learning_rate", type=float, default=1.2e-3)
    parser.add_argument("--validation_batches", type=int, default=16)
    parser.add_argument("--tokens", type=Path, default=Path(".cache/lightning_quartet/study.safetensors"))
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_float32_matmul_precision("high")

    if options.steps < 3 or options.width % 128 or options.width < 128:
        raise SystemExit(
            f"--steps is {options.steps} and --width {options.width}: give at least 3 steps and a multiple of 128."
        )
    file = options.out / "runs.json"
    if any(result["settings"] != settings(options) for result in read_results(file)):
        raise SystemExit(f"{file} holds runs with other settings: give another --out.")
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for run in options.runs:
            if any(result["run"] == run and result["seed"] == seed for result in read_results(file)):
                continue
            torch._dynamo.reset()  # layers of many configurations would reach its limit of recompilations
            result = train(run, seed, options)
            add_result(file, result)
            print(
                run,
                seed,
                *(f"{name} {result[name]:.5g}" for name in ("train_loss", "val_loss", "tokens/s")),
                flush=True,
            )
    print(table(read_results(file), options.runs))


if __name__ == "__main__":
    main()
