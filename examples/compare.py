"""What MXFP4 costs on a recipe: results on the same data from the same start, as a Markdown table.

    python examples/compare.py examples/classify_text/config.yaml [--seeds 1 2 3] [--recipes quartet bf16_backward]

high precision     trained and evaluated without MXFP4, in the YAML's precision
after training     the same weights, evaluated with MXFP4 products
MXFP4 training     trained and evaluated with the YAML's QuartetQAT, or with each of --recipes
others             YAML files named with --others, trained and evaluated as they are

Callbacks that watch, draw or keep (LossCurve, ModelCheckpoint, progress bars) are left out of all rows.

More options go to `lightning-quartet` as they are: --trainer.precision=bf16-mixed, say. The numbers are those that
the model logs in its test, and a language model's perplexity; with them the training's last tokens per second, where
the model logs them, and its peak memory on a GPU. The runs' folders are `runs/compare/...`.

--json FILE keeps each row as it is done: rows that it has are not repeated, and several calls may add to it
at the same time.
"""

import argparse
import copy
import functools
import gc
import hashlib
import math
import statistics
import sys
import tempfile
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from lightning_quartet import QuartetPrecision, QuartetQAT
from lightning_quartet.recipes import CausalLM
from lightning_quartet.recipes.results import Result, change_results, read_results
from quartet_kernels import QuartetConfig

QAT = "lightning_quartet.QuartetQAT"
WATCHERS = {
    *("LossCurve", "TextSample", "QuartetMonitor", "ModelCheckpoint", "OnExceptionCheckpoint"),
    *("LearningRateMonitor", "DeviceStatsMonitor", "ThroughputMonitor"),
    *("ModelSummary", "RichModelSummary", "TQDMProgressBar", "RichProgressBar"),
}
"""Callbacks that no row has."""


def bare(config: dict[str, Any]) -> dict[str, Any]:
    """A recipe without callbacks that watch, draw and keep, which change no number; its logs go to ``runs/compare``."""
    config = copy.deepcopy(config)
    trainer = config["trainer"]
    callbacks = trainer.get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    callbacks = [{"class_path": c} if isinstance(c, str) else c for c in callbacks]
    trainer["callbacks"] = [c for c in callbacks if _name(c) not in WATCHERS]
    trainer["logger"] = {
        "class_path": "lightning.pytorch.loggers.CSVLogger",
        "init_args": {"save_dir": "runs/compare", "name": "others"},
    }
    for switch in ("enable_checkpointing", "enable_progress_bar", "enable_model_summary"):
        trainer.setdefault(switch, False)
    return config


def split(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe without and with MXFP4."""
    if "QuartetPrecision" in str(config["trainer"].get("plugins")):
        raise SystemExit("QuartetPrecision in the configuration would convert every row: name a precision instead.")
    ours = bare(config)
    callbacks = ours["trainer"]["callbacks"]
    if not any(_name(callback) == "QuartetQAT" for callback in callbacks):
        callbacks.append({"class_path": QAT})
    plain = copy.deepcopy(ours)
    plain["trainer"]["callbacks"] = [callback for callback in callbacks if _name(callback) != "QuartetQAT"]
    for one, name in ((plain, "plain"), (ours, "quartet")):
        one["trainer"]["logger"]["init_args"]["name"] = name
    return plain, ours


def _name(callback: dict[str, Any]) -> str:
    return callback["class_path"].rpartition(".")[2]


def qat_of(recipe: dict[str, Any]) -> dict[str, Any]:
    """The entry of a recipe's QuartetQAT."""
    (qat,) = (callback for callback in recipe["trainer"]["callbacks"] if _name(callback) == "QuartetQAT")
    return qat


def with_options(recipe: dict[str, Any], /, **options: Any) -> dict[str, Any]:
    """The recipe with other options of its QuartetQAT; None for what it would be without."""
    recipe = copy.deepcopy(recipe)
    qat = qat_of(recipe)
    options = {**qat.get("init_args", {}), **options}
    qat["init_args"] = {name: value for name, value in options.items() if value is not None}
    return recipe


def build(config: dict[str, Any], options: list[str], seed: int, mxfp4: bool | None = None) -> LightningCLI:
    """Model, data and Trainer of a configuration; ``mxfp4`` says whether it must convert the model, or must not."""
    torch._dynamo.reset()  # compiled layers of many rows would reach its limit of recompilations
    config = copy.deepcopy(config)
    config["trainer"]["logger"]["init_args"]["name"] += f"-{seed}"  # processes must not share a run's folder
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(config, file)
        file.flush()
        arguments = ["--config", file.name, f"--seed_everything={seed}", *options]
        cli = LightningCLI(args=arguments, run=False, save_config_callback=None)
    converts = any(isinstance(callback, QuartetQAT) for callback in cli.trainer.callbacks)  # type: ignore[attr-defined]
    converts |= isinstance(cli.trainer.precision_plugin, QuartetPrecision)
    if mxfp4 is not None and converts != mxfp4:
        made = "MXFP4" if converts else "high precision"
        raise SystemExit(f"The options {options} make {made} of every row: leave out those that do.")
    return cli


def evaluate(cli: LightningCLI) -> dict[str, float]:
    """What the model logs in its test."""
    (results,) = cli.trainer.test(cli.model, cli.datamodule, verbose=False)
    if isinstance(cli.model, CausalLM):
        results = {**results, "perplexity": math.exp(results["test_loss"])}
    return dict(results)


def train(cli: LightningCLI) -> dict[str, float]:
    """The test's results after a training, and what the training took."""
    gc.collect()  # what is left of the row before
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    cli.trainer.fit(cli.model, cli.datamodule)
    took = {}
    if "tokens_per_second" in cli.trainer.callback_metrics:
        took["tokens/s"] = cli.trainer.callback_metrics["tokens_per_second"].item()
    if torch.cuda.is_available():
        took["peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return {**evaluate(cli), **took}


def compare(
    config: dict[str, Any], options: list[str], seed: int, recipes: list[str], others: list[Path], done: Container[str]
) -> Iterator[tuple[str, dict[str, float]]]:
    """Rows of the table that are not done, each with its results."""
    plain, ours = split(config)
    if "high precision" not in done or "after training" not in done:
        trained = build(plain, options, seed, False)
        yield "high precision", train(trained)
        weights = {name: tensor.cpu() for name, tensor in trained.model.state_dict().items()}
        del trained
        after = build(with_options(ours, start_step=None, end_step=None), options, seed, True)
        after.model.load_state_dict(weights)
        yield "after training", evaluate(after)
        del after
    for recipe in recipes or [None]:
        row = f"MXFP4 training {recipe or ''}".rstrip()
        if row not in done:
            yield row, train(build(with_options(ours, config=recipe) if recipe else ours, options, seed, True))
    for file in others:
        if file.stem not in done:
            yield file.stem, train(build(bare(yaml.safe_load(file.read_text())), options, seed))


def with_row(results: list[Result], about: Result, seed: int, row: str, found: dict[str, float]) -> list[Result]:
    """Results of runs, one for each seed, and a row more in that of this seed."""
    others = [result for result in results if result["seed"] != seed]
    rows = next((result["rows"] for result in results if result["seed"] == seed), {})
    return [*others, {**about, "seed": seed, "rows": {**rows, row: found}}]


def table(runs: list[dict[str, dict[str, float]]]) -> str:
    """Means over runs, and standard deviations where there are several."""
    metrics = list(next(iter(runs[0].values())))
    lines = ["| | " + " | ".join(metrics) + " |", "| --- |" + " --- |" * len(metrics)]
    for row in dict.fromkeys(name for run in runs for name in run):
        cells = []
        for metric in metrics:
            values = [run[row][metric] for run in runs if metric in run.get(row, {})]
            if not values:
                cells.append("")
                continue
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.4f}{spread}")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def check(config: dict[str, Any], recipes: list[str], others: list[Path]) -> None:
    """Refuse before anything is trained."""
    for recipe in recipes:
        QuartetConfig.from_recipe(recipe)
    own = qat_of(split(config)[1]).get("init_args", {}).get("config")
    if recipes and isinstance(own, dict):
        raise SystemExit(
            f"--recipes {recipes} would take the place of QuartetQAT's config {own}: leave one of them out."
        )
    stems = [file.stem for file in others]
    if len(set(stems)) < len(stems):
        raise SystemExit(f"--others has files of one name, {stems}, which names their row: rename one.")
    for file in others:
        yaml.safe_load(file.read_text())


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--recipes", nargs="+", default=[])
    parser.add_argument("--others", type=Path, nargs="+", default=[])
    parser.add_argument("--json", type=Path)
    arguments, options = parser.parse_known_args(argv)
    text = arguments.config.read_text()
    config = yaml.safe_load(text)
    check(config, arguments.recipes, arguments.others)
    what = {
        "config": str(arguments.config),
        "sha256": hashlib.sha256(text.encode()).hexdigest()[:16],
        "options": options,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
    }
    found = read_results(arguments.json) if arguments.json else []
    if any({name: result.get(name) for name in what} != what for result in found):
        raise SystemExit(
            f"{arguments.json} holds results of another configuration, device or torch: name another file."
        )
    rows = {result["seed"]: result["rows"] for result in found}
    for seed in arguments.seeds:
        done = rows.setdefault(seed, {})
        for row, results in compare(config, options, seed, arguments.recipes, arguments.others, tuple(done)):
            done[row] = results
            if arguments.json:
                add = functools.partial(with_row, about=what, seed=seed, row=row, found=results)
                change_results(arguments.json, add)
    print(f"{what['config']}, {what['device']}, torch {what['torch']}, seeds {sorted(rows)}\n")
    print(table([rows[seed] for seed in sorted(rows)]))


if __name__ == "__main__":
    main(sys.argv[1:])
