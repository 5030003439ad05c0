"""``lightning-quartet plot``: pictures of a run from its TensorBoard or CSV logs."""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quartet_kernels.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curves = dict[str, list[tuple[int, float]]]
"""(step, value) in order of steps, by the name under which a scalar was logged."""

_MEASURES = {"snr_db": "signal to quantisation noise (dB)", "clip_fraction": "fraction of clipped elements"}
_TENSORS = ("weights", "inputs", "output_gradients")
_MAX_NAMES = 40


def main(argv: Sequence[str]) -> int:
    """Run the command; ``argv`` begins with its name. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="lightning-quartet plot",
        description="Draw loss curves, and what QuartetMonitor measured of each layer, as PNG files.",
    )
    parser.add_argument("run_dir", type=Path, help="folder of a run, or of its versions: then the newest is taken")
    parser.add_argument("--out", type=Path, help="folder for the pictures; the run's own by default")
    options = parser.parse_args(argv[1:])
    try:
        written = plot_run(options.run_dir, options.out)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"lightning-quartet plot: {error}\n")
        return 1
    sys.stdout.write("".join(f"{file}\n" for file in written))
    return 0


def plot_run(run_dir: str | Path, out: str | Path | None = None) -> list[Path]:
    """Draw what a run logged: ``loss.png``, ``snr_db.png``, ``clip_fraction.png``, of each what there is.

    Args:
        run_dir: Folder with event files of TensorBoard or a ``metrics.csv``, or with folders ``version_*`` of them.
        out: Folder for the pictures, made where it is missing; None means the run's.

    Returns:
        The files written.

    Raises:
        ValueError: If there are no logs, they cannot be read, or they hold nothing to draw.
        OSError: If a file cannot be read or written.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "matplotlib is not installed; it comes with the extra `examples`: "
            "pip install -e '.[examples]' in the root of the clone.",
            name="matplotlib",
        ) from error
    folder = _find_run(Path(run_dir))
    curves = read_curves(folder)
    pictures: dict[str, Callable[[], Figure | None]] = {"loss.png": lambda: _draw_losses(curves)}
    for measure in _MEASURES:
        pictures[f"{measure}.png"] = lambda measure=measure: _draw_layers(curves, measure)  # type: ignore[misc]
    target = Path(out) if out is not None else folder
    written = []
    for name, draw in pictures.items():
        figure = draw()
        if figure is not None:
            target.mkdir(parents=True, exist_ok=True)
            _save(figure, target / name)
            written.append(target / name)
    if not written:
        raise ValueError(
            f"{str(folder)!r} has logs, but no scalar with 'loss' in its name and nothing of QuartetMonitor."
        )
    return written


def read_curves(folder: Path) -> Curves:
    """All scalars that a run logged in this folder.

    Raises:
        ValueError: If a file cannot be read.
    """
    found: dict[str, dict[int, float]] = {}
    for name, step, value in _read_csv(folder) if (folder / "metrics.csv").is_file() else _read_events(folder):
        found.setdefault(name, {})[step] = value  # of a step that was logged twice, after a resume, the last
    return {name: sorted(values.items()) for name, values in found.items()}


def _find_run(folder: Path) -> Path:
    if not folder.is_dir():
        raise ValueError(f"{str(folder)!r} is not a folder; give the folder of a run, such as runs/my_run/version_0.")
    candidates = [folder, *sorted(folder.glob("version_*"), key=_version, reverse=True)]
    for candidate in candidates:
        if (candidate / "metrics.csv").is_file() or any(candidate.glob("events.out.tfevents.*")):
            return candidate
    raise ValueError(
        f"{str(folder)!r} has neither event files of TensorBoard nor a metrics.csv, and no version_* folder has; give "
        "the folder that the logger wrote to."
    )


def _version(folder: Path) -> int:
    number = folder.name.removeprefix("version_")
    return int(number) if number.isdecimal() else -1


def _read_csv(folder: Path) -> Iterator[tuple[str, int, float]]:
    file = folder / "metrics.csv"
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                for name, text in row.items():
                    if name not in ("step", "epoch") and text:
                        yield name, int(row["step"]), float(text)
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{str(file)!r} is not a metrics.csv of Lightning's CSVLogger.") from error


def _read_events(folder: Path) -> Iterator[tuple[str, int, float]]:
    from tensorboard.backend.event_processing import event_accumulator  # type: ignore[import-untyped]
    from tensorboard.util.tensor_util import make_ndarray  # type: ignore[import-untyped]

    scalars, tensors = event_accumulator.SCALARS, event_accumulator.TENSORS

    events = event_accumulator.EventAccumulator(str(folder), size_guidance={scalars: 0, tensors: 0})
    try:
        events.Reload()
    except Exception as error:  # what it raises for a broken file is not documented
        raise ValueError(f"The event files in {str(folder)!r} cannot be read: {error}.") from error
    for name in events.Tags()[scalars]:
        for event in events.Scalars(name):
            yield name, event.step, event.value
    for name in events.Tags()[tensors]:
        for event in events.Tensors(name):
            if not event.tensor_proto.tensor_shape.dim and event.tensor_proto.dtype == 1:  # a float
                yield name, event.step, float(make_ndarray(event.tensor_proto))


def _draw_losses(curves: Curves) -> Figure | None:
    from matplotlib.figure import Figure

    ours = ("quartet/", "quartet_mean/", "quartet_worst/")  # of layers, some with such a name
    losses = {name: points for name, points in curves.items() if "loss" in name and not name.startswith(ours)}
    if not losses:
        return None
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in losses.items():
        axes.plot(*zip(*points, strict=True), label=name, marker="o" if len(points) < 20 else None, markersize=3)
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _draw_layers(curves: Curves, measure: str) -> Figure | None:
    """A picture with a map for each tensor: layers from top to bottom, steps from left to right."""
    from matplotlib.figure import Figure

    maps: dict[str, Curves] = {}
    for name, points in curves.items():
        prefix, _, rest = name.partition("/")
        layer, _, rest = rest.partition("/")
        tensor, _, what = rest.partition("/")
        if prefix == "quartet" and what == measure and tensor in _TENSORS:
            maps.setdefault(tensor, {})[layer] = points
    if not maps:
        return None
    tallest = min(max(map(len, maps.values())), 2 * _MAX_NAMES)
    figure = Figure(figsize=(1 + 4.5 * len(maps), 2 + 0.18 * tallest), layout="constrained")
    figure.suptitle(_MEASURES[measure])
    present = [tensor for tensor in _TENSORS if tensor in maps]
    for axes, tensor in zip(figure.subplots(1, len(present), squeeze=False)[0], present, strict=True):
        layers = maps[tensor]
        steps = sorted({step for points in layers.values() for step, _ in points})
        columns = {step: i for i, step in enumerate(steps)}
        values = [[math.nan] * len(steps) for _ in layers]
        for row, points in zip(values, layers.values(), strict=True):
            for step, value in points:
                row[columns[step]] = value if math.isfinite(value) else math.nan
        image = axes.imshow(values, aspect="auto", interpolation="nearest")
        axes.set(title=tensor.replace("_", " "), xlabel="step")
        axes.set_xticks(_spaced(len(steps), 6), [str(steps[i]) for i in _spaced(len(steps), 6)])
        rows = _spaced(len(layers), _MAX_NAMES)
        names = [list(layers)[i] for i in rows]
        repeated = tensor != present[0] and list(layers) == list(maps[present[0]])
        axes.set_yticks(rows, [""] * len(rows) if repeated else names, fontsize=7)
        figure.colorbar(image, ax=axes)
    return figure


def _spaced(count: int, most: int) -> list[int]:
    return list(range(0, count, -(-count // most)))


def _save(figure: Figure, file: Path) -> None:
    with replacing(file) as path:
        figure.savefig(path, dpi=120)
