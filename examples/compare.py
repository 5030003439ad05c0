"""What MXFP4 costs on a recipe: three results on the same data from the same start, as a Markdown table.

    python examples/compare.py examples/classify_text/config.yaml [--seeds 1 2 3] [--any.option=value ...]

float32            trained and evaluated without QuartetQAT, in the YAML's precision
after training     the same weights, evaluated with MXFP4 products
MXFP4 training     trained and evaluated with QuartetQAT as the YAML has it

More options go to `lightning-quartet` as they are. The numbers are those that the model logs in its test (in its
validation where it has no test); the runs' folders are `runs/compare/...`.
"""

import argparse
import copy
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.model_helpers import is_overridden

QAT = "lightning_quartet.QuartetQAT"


def split(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe without and with MXFP4; without a monitor or pictures, which change no number."""
    ours = copy.deepcopy(config)
    callbacks = ours["trainer"]["callbacks"]
    qat = [c for c in callbacks if c["class_path"] == QAT] or [{"class_path": QAT}]
    ours["trainer"]["callbacks"] = qat
    plain = copy.deepcopy(ours)
    plain["trainer"]["callbacks"] = []
    for one, name in ((plain, "plain"), (ours, "quartet")):
        one["trainer"]["logger"] = {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": "runs/compare", "name": name},
        }
        one["trainer"].setdefault("enable_checkpointing", False)
    return plain, ours


def build(config: dict[str, Any], options: list[str], seed: int) -> LightningCLI:
    """Model, data and Trainer of a configuration."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        yaml.safe_dump(config, file)
        file.flush()
        arguments = ["--config", file.name, f"--seed_everything={seed}", *options]
        return LightningCLI(args=arguments, run=False, save_config_callback=None)


def evaluate(cli: LightningCLI) -> dict[str, float]:
    """What the model logs in its test, or in its validation."""
    stage = cli.trainer.test if is_overridden("test_step", cli.model) else cli.trainer.validate
    (results,) = stage(cli.model, cli.datamodule, verbose=False)
    return dict(results)


def compare(config: dict[str, Any], options: list[str], seed: int) -> dict[str, dict[str, float]]:
    """Row of the table to its results."""
    plain, ours = split(config)
    rows = {}
    trained = build(plain, options, seed)
    trained.trainer.fit(trained.model, trained.datamodule)
    rows["float32"] = evaluate(trained)
    weights = {name: tensor.cpu() for name, tensor in trained.model.state_dict().items()}
    after = build(ours, options, seed)
    after.model.load_state_dict(weights)
    rows["after training"] = evaluate(after)
    quartet = build(ours, options, seed)
    quartet.trainer.fit(quartet.model, quartet.datamodule)
    rows["MXFP4 training"] = evaluate(quartet)
    return rows


def table(runs: list[dict[str, dict[str, float]]]) -> str:
    """Means over runs, and standard deviations where there are several."""
    metrics = list(next(iter(runs[0].values())))
    lines = ["| | " + " | ".join(metrics) + " |", "| --- |" + " --- |" * len(metrics)]
    for row in runs[0]:
        cells = []
        for metric in metrics:
            values = [run[row][metric] for run in runs]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.4f}{spread}")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    arguments, options = parser.parse_known_args(argv)
    config = yaml.safe_load(arguments.config.read_text())
    runs = [compare(config, options, seed) for seed in arguments.seeds]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{arguments.config}, {device}, torch {torch.__version__}, seeds {arguments.seeds}\n\n{table(runs)}")


if __name__ == "__main__":
    main(sys.argv[1:])
