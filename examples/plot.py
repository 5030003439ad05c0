"""Draws the pictures of the README from the numbers that compare.py and study.py left in the repository.

python examples/plot.py [--out docs/images]
"""

import argparse
import statistics
import sys
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_quartet.recipes.results import Result, read_results

EXAMPLES = Path(__file__).parent
STUDY = EXAMPLES / "language_model" / "study"
RECIPES = {  # folder: title, metric, factor
    "finetune_llm": ("SmolLM2-135M on Jane Austen", "perplexity", 1),
    "classify_text": ("MiniLM, spam or not", "test_accuracy", 100),
    "classify_images": ("ViT-S/14 on Fashion-MNIST", "test_accuracy", 100),
}
LABELS = {
    "high precision": "bfloat16",
    "after training": "MXFP4 after\ntraining",
    "MXFP4 training quartet": "MXFP4\ntraining",
    "MXFP4 training bf16_backward": "MXFP4, bf16\nbackward",
    "lora": "LoRA, packed\nbase",
}


def draw_recipe(axes: Axes, folder: str) -> None:
    """Mean and standard deviation over seeds of each row."""
    title, metric, factor = RECIPES[folder]
    results = read_results(EXAMPLES / folder / "results.json")
    rows = list(results[0]["rows"])
    for number, row in enumerate(rows):
        values = [factor * result["rows"][row][metric] for result in results]
        mean, spread = statistics.mean(values), statistics.stdev(values)
        colour = "tab:gray" if row == "high precision" else "tab:orange" if row == "after training" else "tab:blue"
        axes.errorbar(number, mean, spread, fmt="o", color=colour, capsize=4)
        axes.annotate(f"{mean:.1f}", (number, mean), (10, 0), textcoords="offset points", va="center")
    axes.set_xticks(range(len(rows)), [LABELS[row] for row in rows], fontsize=7)
    axes.set_title(f"{title}, {len(results)} seeds", fontsize=10)
    axes.set(ylabel="accuracy, %" if factor == 100 else metric, xlim=(-0.5, len(rows) - 0.2))
    axes.grid(axis="y", alpha=0.3)


def draw_curves(axes: Axes, results: list[Result]) -> None:
    """Training loss of each run, the mean over its seeds."""
    for run in dict.fromkeys(result["run"] for result in results):
        curves = [result["losses"] for result in results if result["run"] == run]
        steps = results[0]["settings"]["steps"]
        x = [step * steps / len(curves[0]) for step in range(len(curves[0]))]
        axes.plot(x, [statistics.mean(points) for points in zip(*curves, strict=True)], label=run, linewidth=1)
    axes.set(xlabel="step", ylabel="training loss (nats per token)", ylim=(None, 6))
    axes.legend()


def draw_differences(axes: Axes, results: list[Result], baseline: str = "bf16") -> None:
    """Validation loss less the baseline's, a point for each pair, and mean and standard error; lowest mean first."""
    found = {(result["run"], result["seed"]): result["val_loss"] for result in results}
    gaps: dict[str, list[float]] = {}
    for (run, seed), loss in found.items():
        gaps.setdefault(run, []).append(loss - found[baseline, seed])
    runs = sorted(set(gaps) - {baseline}, key=lambda run: statistics.mean(gaps[run]))
    for number, run in enumerate(runs):
        axes.plot(gaps[run], [number] * len(gaps[run]), "o", color="tab:gray", markersize=4)
        error = statistics.stdev(gaps[run]) / len(gaps[run]) ** 0.5 if len(gaps[run]) > 1 else None
        axes.errorbar(statistics.mean(gaps[run]), number - 0.2, xerr=error, fmt="s", color="tab:blue", capsize=3)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(runs)), runs)
    axes.set(xlabel=f"validation loss less {baseline}'s", ylim=(len(runs) - 0.4, -0.6))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=EXAMPLES.parent / "docs" / "images")
    options = parser.parse_args(sys.argv[1:])
    options.out.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(11, 3), layout="constrained")
    for axes, folder in zip(figure.subplots(1, 3, width_ratios=[5, 3, 3]), RECIPES, strict=True):
        draw_recipe(axes, folder)
    figure.savefig(options.out / "recipes.png", dpi=100)
    for file in STUDY.glob("results/*.json"):
        results = read_results(file)
        drawings = [draw_curves] if "losses" in results[0] else []  # curves need not be kept
        drawings.append(draw_differences)
        runs = len({result["run"] for result in results})
        figure = Figure(figsize=(4.5 * len(drawings), max(3.2, 0.26 * runs)), layout="constrained")
        for axes, draw in zip(figure.subplots(1, len(drawings), squeeze=False)[0], drawings, strict=True):
            draw(axes, results)
        figure.savefig(options.out / f"study_{file.stem}.png", dpi=100)


if __name__ == "__main__":
    main()
