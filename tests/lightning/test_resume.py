"""A run that was stopped, resumed or killed ends bit for bit like one that was not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader
from toy import LateToy, Toy, assert_same, make, trainer, weights

from lightning_quartet import QuartetConfig, QuartetPrecision, QuartetQAT

ROOT = Path(__file__).parents[2]


def parts(kind: str, recipe: str) -> dict:
    if kind == "callback":
        return {"callbacks": [QuartetQAT(recipe)]}
    return {"plugins": [QuartetPrecision("32-true", recipe)]}


@pytest.mark.parametrize("kind", ["callback", "plugin"])
@pytest.mark.parametrize("recipe", ["quartet", "quartet_stochastic"])
@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_ten_and_ten_steps_equal_twenty(tmp_path, kind, recipe, checkpointing):
    """With accumulation and dropout: 20 batches an epoch, 10 optimizer steps."""
    options = {"checkpointing": checkpointing, "dropout": 0.2, "batches": 20}
    whole = make(**options)
    whole_trainer = trainer(max_epochs=2, accumulate_grad_batches=2, **parts(kind, recipe))
    whole_trainer.fit(whole)
    assert whole_trainer.global_step == 20

    first = make(**options)
    t = trainer(max_epochs=1, accumulate_grad_batches=2, **parts(kind, recipe))
    t.fit(first)
    t.save_checkpoint(tmp_path / "a.ckpt")
    torch.manual_seed(77)
    second = Toy(**options)
    t = trainer(max_epochs=2, accumulate_grad_batches=2, **parts(kind, recipe))
    t.fit(second, ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert t.global_step == 20
    assert_same(whole.losses, first.losses + second.losses)
    assert_same(whole.notes, first.notes + second.notes)
    assert_same(weights(whole), weights(second))
    assert_same(whole_trainer.optimizers[0].state_dict(), t.optimizers[0].state_dict())


@pytest.mark.parametrize("model_class", [Toy, LateToy])
def test_float32_masters_resume_exactly(tmp_path, model_class):
    def new_trainer(epochs: int):
        return trainer(max_epochs=epochs, precision="bf16-true", callbacks=[QuartetQAT(master_dtype="float32")])

    whole, first, second = (make(model_class, dropout=0.0) for _ in range(3))
    torch.manual_seed(3)
    new_trainer(2).fit(whole)
    t = new_trainer(1)
    torch.manual_seed(3)
    t.fit(first)
    t.save_checkpoint(tmp_path / "a.ckpt")
    new_trainer(2).fit(second, ckpt_path=tmp_path / "a.ckpt")
    assert whole.net[0].weight.dtype == torch.float32
    assert whole.head.weight.dtype == torch.bfloat16
    assert_same(weights(whole), weights(second))


@pytest.mark.parametrize("before", ["callback", "plugin"])
@pytest.mark.parametrize("after", ["callback", "plugin"])
def test_callback_and_plugin_go_on_from_each_others_checkpoints(tmp_path, before, after):
    """With the random bits of the steps that follow."""
    runs = []
    for first, second in (("callback", "callback"), (before, after)):
        t = trainer(max_epochs=1, **parts(first, "quartet_stochastic"))
        t.fit(make(dropout=0.0))
        t.save_checkpoint(tmp_path / "a.ckpt")
        model = Toy(dropout=0.0)
        torch.manual_seed(3)
        trainer(max_epochs=2, **parts(second, "quartet_stochastic")).fit(model, ckpt_path=tmp_path / "a.ckpt")
        runs.append(model)
    assert_same(*(run.losses for run in runs))
    assert_same(*map(weights, runs))


def test_resume_in_the_middle_of_an_accumulation(tmp_path):
    """A checkpoint between two micro-batches: the next batch is the next micro-batch."""
    t = trainer(accumulate_grad_batches=4, limit_train_batches=6, callbacks=[QuartetQAT()])

    class Save(Toy):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == 1:
                self.trainer.save_checkpoint(tmp_path / "a.ckpt")

    model = make(Save, batches=6)
    t.fit(model)
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]["QuartetQAT"]
    assert (state["step"], state["micro_batch"]) == (0, 1)
    resumed = make(batches=6)
    trainer(accumulate_grad_batches=4, callbacks=[QuartetQAT()]).fit(resumed, ckpt_path=tmp_path / "a.ckpt")
    assert resumed.notes[0][2][1:] == [0, 2]


def test_a_different_seed_would_be_noticed():
    """That the exact tests can fail: one bit of the seed changes the weights."""
    runs = []
    for seed in (0, 1):
        model = make()
        trainer(callbacks=[QuartetQAT(QuartetConfig(seed=seed))]).fit(model)
        runs.append(weights(model))
    assert not torch.equal(runs[0]["net.0.weight"], runs[1]["net.0.weight"])


SCRIPT = """
import sys, time
sys.path[:0] = [{tests!r}, {root!r}, {kernels!r}]
from pathlib import Path
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning_quartet import QuartetQAT
from toy import make, trainer

class Slow(Callback):
    def on_train_batch_end(self, *args):
        print("step", flush=True)
        time.sleep(float(sys.argv[2]))

folder = Path(sys.argv[1])
last = folder / "last.ckpt"
model = make(dropout=0.0, batches=5)
saver = ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_epochs=1)
t = trainer(max_epochs=12, enable_checkpointing=True, default_root_dir=folder,
            callbacks=[QuartetQAT("quartet_stochastic"), saver, Slow()])
t.fit(model, ckpt_path=last if last.exists() else None)
torch.save(model.state_dict(), folder / "final.pt")
"""


def run_script(folder: Path, delay: float) -> subprocess.Popen:
    script = SCRIPT.format(tests=str(ROOT / "tests/lightning"), root=str(ROOT), kernels=str(ROOT / "kernels"))
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", script, str(folder), str(delay)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(tmp_path, kills):
    generator = random.Random(kills)
    for _ in range(kills):
        process = run_script(tmp_path / "killed", delay=0.02)
        for _ in range(generator.randint(3, 25)):
            if not process.stdout.readline().startswith(b"step"):
                break
        time.sleep(generator.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert run_script(tmp_path / "killed", delay=0).wait() == 0
    assert run_script(tmp_path / "whole", delay=0).wait() == 0
    states = [torch.load(tmp_path / name / "final.pt", weights_only=True) for name in ("killed", "whole")]
    assert_same(*states)


class Failing(Toy):
    """Batches are alike, so that the one that fails can be repeated: in the forward, in the backward or after it."""

    where: str | None = None

    def train_dataloader(self):
        batch = torch.randn(4, 32, generator=torch.Generator().manual_seed(4))
        return DataLoader(batch.repeat(self.batches, 1), batch_size=4)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 5 and self.where == "forward":
            raise RuntimeError("stop")
        if batch_idx == 5 and self.where == "backward":
            loss.register_hook(lambda gradient: 1 / 0)
        return loss

    def on_after_backward(self):
        if self.where == "after" and len(self.losses) == 6:
            raise RuntimeError("stop")


@pytest.mark.parametrize("kind", ["callback", "plugin"])
@pytest.mark.parametrize("where", ["forward", "backward", "after"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_batch_that_failed_is_repeated_with_the_same_random_bits(tmp_path, kind, where, accumulate):
    def new_trainer():
        options = parts(kind, "quartet")
        options["callbacks"] = [*options.get("callbacks", []), pl.callbacks.OnExceptionCheckpoint(tmp_path)]
        return trainer(max_epochs=1, accumulate_grad_batches=accumulate, enable_checkpointing=True, **options)

    whole, first, second = (make(Failing, dropout=0.0) for _ in range(3))
    new_trainer().fit(whole)
    first.where = where
    with pytest.raises((RuntimeError, ZeroDivisionError)):
        new_trainer().fit(first)
    new_trainer().fit(second, ckpt_path=tmp_path / "on_exception.ckpt", weights_only=True)
    assert second.notes == whole.notes[5:]
    if accumulate == 1:  # gradients summed so far are in no checkpoint
        assert_same(weights(whole), weights(second))
