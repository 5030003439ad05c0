"""QuartetMonitor in trainings: what it finds, what it leaves alone, what it costs."""

import math
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_quartet import QuartetConfig, QuartetMonitor, QuartetQAT, pack_quartet, set_quartet_step
from lightning_quartet.convert import convert_to_quartet


class Net(pl.LightningModule):
    """Three linear layers; the first sees the data, the second half-dead units, the third everything."""

    def __init__(self, width: int = 64, batches: int = 6, batch_size: int = 16) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.third = nn.Linear(width, width)
        self.shape = (batches * batch_size, width)
        self.batch_size = batch_size
        self.hooks: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.relu(self.second(torch.relu(self.first(x)))))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.hooks.append(sum(len(layer._forward_hooks) for layer in (self.first, self.second, self.third)))
        return (self(batch) - batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 1e-2)

    def train_dataloader(self) -> DataLoader:
        data = torch.randn(*self.shape, generator=torch.Generator().manual_seed(0))
        return DataLoader(data, batch_size=self.batch_size)


class Notes(pl.Callback):
    """The monitor's values after each batch."""

    def __init__(self, monitor: QuartetMonitor) -> None:
        self.monitor = monitor
        self.values: list[dict[str, float]] = []

    def on_train_batch_end(self, *args: Any) -> None:
        self.values.append(self.monitor.latest)


def train(model: pl.LightningModule, monitor: QuartetMonitor, config: Any = None, **options: Any) -> pl.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    callbacks = [QuartetQAT(config), monitor, *options.pop("callbacks", [])]
    resumed = options.pop("ckpt_path", None)
    trainer = pl.Trainer(**{"accelerator": "cpu", "max_epochs": 1, **quiet, **options, "callbacks": callbacks})
    trainer.fit(model, ckpt_path=resumed)
    return trainer


def test_values_are_those_of_the_tensors() -> None:
    from lightning_quartet.metrics import ClipFraction, GradientAlignment, QuantizationSNR
    from quartet_kernels.linear import quartet_linear
    from quartet_kernels.philox import SIGNS_DX, draw_signs, make_seed

    model = Net(batches=1)
    x = next(iter(model.train_dataloader()))
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}
    monitor = QuartetMonitor()
    train(model, monitor)

    inputs = QuantizationSNR()
    inputs.update(x)
    assert monitor.latest["quartet/first/inputs/snr_db"] == pytest.approx(inputs.compute().item(), abs=1e-9)
    weights, clip = QuantizationSNR(), ClipFraction()
    weights.update(plain["third.weight"])
    clip.update(plain["third.weight"])
    assert monitor.latest["quartet/third/weights/snr_db"] == pytest.approx(weights.compute().item(), abs=1e-9)
    assert monitor.latest["quartet/third/weights/clip_fraction"] == clip.compute().item()

    # The last layer's gradients by hand: its number among the layers is 2.
    seed = torch.tensor(make_seed(0, layer=2))
    h = x
    for number, name in enumerate(("first", "second")):
        w, b = plain[f"{name}.weight"], plain[f"{name}.bias"]
        h = torch.relu(quartet_linear(h, w, b, config=QuartetConfig(), seed=torch.tensor(make_seed(0, layer=number))))
    h, w = h.requires_grad_(), plain["third.weight"].requires_grad_()
    y = quartet_linear(h, w, plain["third.bias"], config=QuartetConfig(), seed=seed)
    dy = 2 * (y - x).detach() / y.numel()
    dx, dw = torch.autograd.grad(y, (h, w), dy)
    for name, got, exact in (("input", dx, dy @ w), ("weight", dw, dy.t() @ h)):
        want = GradientAlignment()
        want.update(got, exact)
        for measure, value in want.compute().items():
            assert monitor.latest[f"quartet/third/{name}_gradients/{measure}"] == pytest.approx(value.item(), rel=1e-5)
    gradients = QuantizationSNR(mode="backward")
    gradients.update(dy * draw_signs(seed, SIGNS_DX).repeat(2))
    assert monitor.latest["quartet/third/output_gradients/snr_db"] == pytest.approx(
        gradients.compute().item(), abs=1e-3
    )
    assert 0.8 < monitor.latest["quartet/third/weight_gradients/cosine"] < 1
    assert 0.8 < monitor.latest["quartet/third/weight_gradients/projection"] < 1.2
    assert "quartet/first/input_gradients/cosine" not in monitor.latest  # the data needs no gradient


def test_it_finds_an_outlier_channel_and_a_dead_layer() -> None:
    model = Net(batches=1)
    with torch.no_grad():
        model.first.weight[5] *= 1000  # one channel of the second layer's input
        model.first.bias[5] = 1000
        model.second.bias.fill_(-1e6)  # nothing gets through: the third layer's input is all zeros
    monitor = QuartetMonitor()
    train(model, monitor)
    spread = {name: monitor.latest[f"quartet/{name}/inputs/scale_spread"] for name in ("first", "second", "third")}
    assert max(spread, key=spread.__getitem__) == "second"
    assert spread["second"] >= 3 > spread["first"]
    assert monitor.latest["quartet_worst/inputs/scale_spread"] == spread["second"]
    dead = {name: monitor.latest[f"quartet/{name}/inputs/zero_groups"] for name in ("first", "second", "third")}
    assert dead == {"first": 0.0, "second": 0.0, "third": 1.0}
    assert monitor.latest["quartet_worst/inputs/zero_groups"] == 1
    assert monitor.latest["quartet/second/output_gradients/zero_groups"] == 1  # nor does a gradient come back
    assert "quartet/third/weight_gradients/cosine" not in monitor.latest


def test_it_names_the_layer_that_diverges() -> None:
    model = Net(batches=1)
    with torch.no_grad():
        model.second.weight[7, 7] = math.inf
    monitor = QuartetMonitor()
    train(model, monitor)
    names = ("first", "second", "third")
    broken = [name for name in names if math.isnan(monitor.latest[f"quartet/{name}/weights/snr_db"])]
    assert broken == ["second"]
    assert math.isnan(monitor.latest["quartet_worst/weights/snr_db"])
    assert math.isfinite(monitor.latest["quartet/second/inputs/snr_db"])
    assert math.isnan(monitor.latest["quartet/third/inputs/snr_db"])


def test_nothing_is_left_on_other_steps() -> None:
    model = Net(batches=6)
    monitor = QuartetMonitor(every_n_steps=3)
    notes = Notes(monitor)
    train(model, monitor, callbacks=[notes])
    assert model.hooks == [3, 0, 0, 3, 0, 0]
    assert [a is b for a, b in zip(notes.values, notes.values[1:], strict=False)] == [True, True, False, True, True]
    assert not any(layer._forward_hooks for layer in (model.first, model.second, model.third))


def test_the_first_step_after_a_resume_is_measured_for_who_stops_by_it(tmp_path: Path) -> None:
    metric = "quartet_worst/inputs/snr_db"
    trainer = train(Net(batches=4), QuartetMonitor(every_n_steps=3))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    model = Net(batches=4)
    early = pl.callbacks.EarlyStopping(metric, check_on_train_epoch_end=True, mode="max")
    options = {"max_epochs": 2, "limit_train_batches": 1, "ckpt_path": tmp_path / "a.ckpt"}
    trainer = train(model, QuartetMonitor(every_n_steps=3), callbacks=[early], **options)
    assert model.hooks == [3]
    assert early.best_score == trainer.callback_metrics[metric]


@pytest.mark.parametrize("config", [None, "quartet_stochastic", "bf16_backward"])
def test_training_is_the_same_with_and_without(config: str | None) -> None:
    watched, alone = Net(), Net()
    train(watched, QuartetMonitor(every_n_steps=1), config)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    pl.Trainer(accelerator="cpu", max_epochs=1, callbacks=[QuartetQAT(config)], **quiet).fit(alone)
    for a, b in zip(watched.parameters(), alone.parameters(), strict=True):
        assert torch.equal(a, b)


def test_accumulation_observes_one_micro_batch_of_a_measured_step() -> None:
    model = Net(batches=6)
    train(model, QuartetMonitor(every_n_steps=2), accumulate_grad_batches=2)
    assert model.hooks == [3, 0, 0, 0, 3, 0]


def test_several_loggers_get_every_measured_step(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [TensorBoardLogger(tmp_path, "tb", version=0), CSVLogger(tmp_path, "csv", version=0)]
    monitor = QuartetMonitor(every_n_steps=2)
    trainer = train(Net(batches=5), monitor, logger=loggers, log_every_n_steps=50)
    name = "quartet/second/inputs/snr_db"
    events = EventAccumulator(str(tmp_path / "tb" / "version_0"), size_guidance={"histograms": 0})
    events.Reload()
    assert [e.step for e in events.Scalars(name)] == [0, 2, 4]
    assert events.Scalars(name)[-1].value == pytest.approx(monitor.latest[name])
    histogram = events.Histograms("quartet/second/inputs/exponents")[-1].histogram_value
    assert histogram.num == 16 * 64 / 32
    assert sum(histogram.bucket) == histogram.num
    lines = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    assert name in lines[0].split(",")
    assert len(lines) == 4
    assert trainer.callback_metrics[name].item() == pytest.approx(monitor.latest[name])
    assert trainer.callback_metrics["quartet_mean/inputs/snr_db"].item() == pytest.approx(
        sum(monitor.latest[f"quartet/{layer}/inputs/snr_db"] for layer in ("first", "second", "third")) / 3
    )


def test_layers_are_chosen_by_pattern() -> None:
    monitor = QuartetMonitor(layers=["second"])
    train(Net(batches=1), monitor)
    assert {name.split("/")[1] for name in monitor.latest if name.startswith("quartet/")} == {"second"}
    with pytest.raises(MisconfigurationException, match="'fourth', which matches no QuartetLinear of Net"):
        train(Net(batches=1), QuartetMonitor(layers=["fourth"]))
    with pytest.raises(MisconfigurationException, match=r"found no QuartetLinear in Net: add QuartetQAT\(\)"):
        pl.Trainer(
            accelerator="cpu", callbacks=[QuartetMonitor()], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        ).fit(Net(batches=1))  # fmt: skip


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="every_n_steps is 0"):
        QuartetMonitor(every_n_steps=0)
    with pytest.raises(ValueError, match="rows is True"):
        QuartetMonitor(rows=True)
    with pytest.raises(TypeError, match="layers is 'second'"):
        QuartetMonitor(layers="second")


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_counts_each_layer_once(reentrant: bool) -> None:
    class Checkpointed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(super().forward, x.requires_grad_(), use_reentrant=reentrant)

    plain, saving = QuartetMonitor(), QuartetMonitor()
    train(Net(batches=1), plain)
    model = Checkpointed(batches=1)
    train(model, saving)
    for name in ("quartet/second/inputs/snr_db", "quartet/third/weight_gradients/cosine"):
        assert saving.latest[name] == plain.latest[name]


def test_packed_layers_show_their_inputs() -> None:
    model = Net(batches=1)
    convert_to_quartet(model, modules_to_not_convert=["third"])
    pack_quartet(model)
    monitor = QuartetMonitor()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[monitor], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    # Something below the packed layers has to learn, so that a gradient passes through them.
    model.scale = nn.Parameter(torch.ones(64))
    model.forward = lambda x: Net.forward(model, x * model.scale)  # type: ignore[method-assign]
    set_quartet_step(model, 0)
    trainer.fit(model)
    assert 10 < monitor.latest["quartet/second/inputs/snr_db"] < 30
    assert not any("weights" in name or "/input_gradients" in name for name in monitor.latest)


def test_a_skipped_batch_leaves_no_hooks() -> None:
    class Skipping(Net):
        def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> int | None:
            return -1 if batch_idx == 0 else None

    model = Skipping(batches=2)
    monitor = QuartetMonitor(every_n_steps=1)
    train(model, monitor)
    assert not any(layer._forward_hooks for layer in (model.first, model.second, model.third))
    assert monitor.latest == {}


def test_an_exception_leaves_no_hooks() -> None:
    class Failing(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            raise RuntimeError("no")

    model = Failing(batches=2)
    with pytest.raises(RuntimeError, match="no"):
        train(model, QuartetMonitor(every_n_steps=1))
    assert not any(layer._forward_hooks for layer in (model.first, model.second, model.third))


def test_compiled_training_is_measured_and_stays_compiled() -> None:
    eager, compiled = QuartetMonitor(every_n_steps=2), QuartetMonitor(every_n_steps=2)
    train(Net(batches=3), eager)
    model = Net(batches=3)
    graphs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(1)
        return graph.forward

    model.first.compile(backend=backend)
    model.second.compile(backend=backend)
    notes: list[int] = []
    step = model.training_step
    model.training_step = lambda *a: (step(*a), notes.append(len(graphs)))[0]  # type: ignore[method-assign]
    train(model, compiled)
    assert notes[0] == 0  # observed, not compiled
    assert notes[1] > 0  # the next one is
    assert notes[2] == notes[1]  # and the one observed after it compiles nothing more
    assert compiled.latest["quartet/second/inputs/snr_db"] == pytest.approx(
        eager.latest["quartet/second/inputs/snr_db"], rel=1e-3
    )


def test_a_measured_step_costs_less_than_one_more_step() -> None:
    # CPU time of one thread, so that other load does not count.
    class Clock(pl.Callback):
        def __init__(self) -> None:
            self.starts: list[float] = []

        def on_train_batch_start(self, *args: Any) -> None:
            self.starts.append(time.process_time())

    clock = Clock()
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    pl.Trainer(
        accelerator="cpu", max_epochs=1, callbacks=[QuartetQAT(), clock, QuartetMonitor(every_n_steps=2)], **quiet
    ).fit(Net(width=512, batches=13, batch_size=512))
    durations = [b - a for a, b in zip(clock.starts, clock.starts[1:], strict=False)][2:]
    measured, plain = min(durations[0::2]), min(durations[1::2])
    assert plain < measured < 2 * plain
