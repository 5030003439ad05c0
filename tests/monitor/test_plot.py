"""``lightning-quartet plot``: logs of both kinds to pictures, and what it says where there are none."""

import csv
from pathlib import Path

import pytest
from matplotlib.image import imread
from torch.utils.tensorboard import SummaryWriter

from lightning_quartet.cli import main
from lightning_quartet.plot import _draw_layers, _draw_losses, plot_run, read_curves

ROWS = [
    {"step": step, "train_loss": 5.0 - step / 10, "quartet/a.0/inputs/snr_db": 18.0 + step, "quartet/a.1/inputs/snr_db":
     17.0, "quartet/a.0/weights/snr_db": 19.0, "quartet/a.0/inputs/clip_fraction": 0.01}
    for step in (0, 10, 20)
]  # fmt: skip


def write_csv(folder: Path) -> Path:
    folder.mkdir(parents=True)
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["epoch", *ROWS[0]])
        writer.writeheader()
        writer.writerows({"epoch": 0, **row} for row in ROWS)
        writer.writerow({"epoch": 0, "step": 30, "train_loss": 1.5})  # a step without the monitor
    return folder


def write_events(folder: Path) -> Path:
    with SummaryWriter(str(folder)) as writer:
        for row in ROWS:
            for name, value in row.items():
                if name != "step":
                    writer.add_scalar(name, value, row["step"])
        writer.add_scalar("train_loss", 1.5, 30)
        writer.add_text("sample", "words", 30)
    return folder


@pytest.mark.parametrize("write", [write_csv, write_events])
def test_logs_are_read_and_drawn(write: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "run")  # type: ignore[operator]
    curves = read_curves(folder)
    assert curves["train_loss"] == [(0, 5.0), (10, 4.0), (20, 3.0), (30, 1.5)]
    assert curves["quartet/a.0/inputs/snr_db"] == [(0, 18.0), (10, 28.0), (20, 38.0)]
    assert main(["plot", str(folder)]) == 0
    names = ["loss.png", "snr_db.png", "clip_fraction.png"]
    assert capsys.readouterr().out.split() == [str(folder / name) for name in names]
    for name in names:
        assert imread(folder / name).std() > 0.01
    assert not list(folder.glob(".*"))


def test_losses_are_found_under_any_folder_of_names() -> None:
    points = [(0, 1.0), (1, 0.5)]
    names = ["loss/train", "train/loss", "val_loss", "quartet/loss_head/inputs/snr_db", "accuracy"]
    figure = _draw_losses(dict.fromkeys(names, points))
    assert [line.get_label() for line in figure.axes[0].lines] == names[:3]


def test_the_pictures_show_the_values(tmp_path: Path) -> None:
    curves = read_curves(write_csv(tmp_path / "run"))
    (axes,) = _draw_losses(curves).axes  # type: ignore[union-attr]
    assert [line.get_label() for line in axes.lines] == ["train_loss"]
    assert list(axes.lines[0].get_ydata()) == [5.0, 4.0, 3.0, 1.5]
    weights, inputs, *_bars = _draw_layers(curves, "snr_db").axes  # type: ignore[union-attr]
    assert (weights.get_title(), inputs.get_title()) == ("weights", "inputs")
    assert [label.get_text() for label in inputs.get_yticklabels()] == ["a.0", "a.1"]
    assert inputs.images[0].get_array().tolist() == [[18.0, 28.0, 38.0], [17.0, 17.0, 17.0]]
    (only, *_bars) = _draw_layers(curves, "clip_fraction").axes  # type: ignore[union-attr]
    assert only.get_title() == "inputs"


def test_the_newest_version_is_taken_and_out_is_made(tmp_path: Path) -> None:
    for version in (2, 10):
        write_csv(tmp_path / "run" / f"version_{version}")
    assert plot_run(tmp_path / "run")[0].parent.name == "version_10"
    out = tmp_path / "a" / "b"
    assert {file.parent for file in plot_run(tmp_path / "run", out)} == {out}


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    folder = write_csv(tmp_path / "run")

    def fail(self: Figure, path: str, **options: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    assert main(["plot", str(folder)]) == 1
    assert [file.name for file in folder.iterdir()] == ["metrics.csv"]


def test_errors_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, other, broken, bytes_ = (tmp_path / name for name in ("empty", "other", "broken", "bytes"))
    empty.mkdir()
    bytes_.mkdir()
    (bytes_ / "metrics.csv").write_bytes(b"\xff\xfe\n")
    for folder, text in ((other, "epoch,step,accuracy\n0,1,0.5\n"), (broken, "epoch,step,loss\n0,1,nonsense\n")):
        folder.mkdir()
        (folder / "metrics.csv").write_text(text)
    for folder, words in (
        (tmp_path / "nowhere", "is not a folder"),
        (empty, "has neither event files of TensorBoard nor a metrics.csv"),
        (other, "no scalar with 'loss' in its name"),
        (broken, "is not a metrics.csv of Lightning's CSVLogger"),
        (bytes_, "is not a metrics.csv of Lightning's CSVLogger"),
    ):
        assert main(["plot", str(folder)]) == 1
        said = capsys.readouterr().err
        assert words in said
        assert said.startswith("lightning-quartet plot: ")
        assert said.count("\n") == 1
