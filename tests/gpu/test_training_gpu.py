"""Training through the Trainer on a GPU: the main job, a real gradient scaler, exact resume, no growth of memory."""

import importlib.util
import math
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_quartet import QuartetPrecision, QuartetQAT
from quartet_kernels import QuartetConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

ROOT = Path(__file__).parents[2]


class Model(pl.LightningModule):
    def __init__(self, poison: int | None = None) -> None:
        super().__init__()
        self.poison = poison
        self.net = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Dropout(0.1), nn.Linear(512, 256))
        self.scales: list[float] = []
        self.losses: list[Tensor] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = (self.net(batch) - batch).square().mean()
        if self.global_step == self.poison:
            loss = loss * math.inf
        self.losses.append(loss.detach())
        return loss

    def on_train_batch_end(self, *arguments: object) -> None:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            self.scales.append(scaler.get_scale())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def data(batches: int = 20) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(torch.randn(batches * 64, 256, generator=generator), batch_size=64)


def fit(model: Model, steps: int, tmp_path: Path, checkpoint: str | None = None, **options: object) -> pl.Trainer:
    options = {"callbacks": [QuartetQAT()], "precision": "bf16-mixed", "max_steps": steps} | options
    trainer = pl.Trainer(
        accelerator="gpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        **options,  # type: ignore[arg-type]
    )
    trainer.fit(model, data(), ckpt_path=checkpoint)
    return trainer


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-mixed"])
@pytest.mark.parametrize("how", ["callback", "plugin"])
def test_every_precision_learns(precision, how, tmp_path):
    pl.seed_everything(0)
    model = Model()
    if how == "callback":
        fit(model, 40, tmp_path, precision=precision)
    else:
        fit(model, 40, tmp_path, callbacks=[], precision=None, plugins=[QuartetPrecision(precision)])
    losses = torch.stack(model.losses).float()
    assert losses.isfinite().all()
    assert losses[-5:].mean() < 0.9 * losses[:5].mean()


def test_a_gradient_scaler_skips_a_step_that_overflows_and_recovers(tmp_path):
    pl.seed_everything(0)
    model = Model()
    with torch.no_grad():
        model.net[0].weight[0, 0] = 60000.0  # products overflow float16: infinities reach the scaler
    weight = model.net[3].weight.detach().clone()
    model.net[0].weight.data[0, 0] = 0.0
    model.poison = 5
    trainer = fit(model, 30, tmp_path, precision="16-mixed")
    assert trainer.global_step == 30
    assert min(model.scales) < max(model.scales)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not torch.equal(model.net[3].weight.cpu(), weight)


@pytest.mark.parametrize("recipe", ["quartet", "quartet_stochastic"])
def test_resume_is_exact(recipe, tmp_path):
    def options(epochs: int) -> dict[str, object]:
        # Bounded by epochs: after `max_steps` at the end of one, Lightning 2.6 drops a batch on resuming.
        return {
            "callbacks": [QuartetQAT(recipe)],
            "deterministic": True,
            "accumulate_grad_batches": 2,
            "max_steps": -1,
            "max_epochs": epochs,
        }

    pl.seed_everything(0)
    whole = Model()
    start = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    whole.net[2].p = 0.0  # Lightning stores no random state: dropout after a resume draws other masks
    fit(whole, 20, tmp_path, **options(2))
    first, second = Model(), Model()
    first.load_state_dict(start)
    first.net[2].p = second.net[2].p = 0.0
    trainer = fit(first, 10, tmp_path, **options(1))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    fit(second, 20, tmp_path, checkpoint=str(tmp_path / "half.ckpt"), **options(2))
    for (name, value), expected in zip(second.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(value.cpu(), expected.cpu()), name
    assert torch.equal(torch.stack(first.losses + second.losses), torch.stack(whole.losses))


@pytest.mark.slow
def test_two_thousand_steps_do_not_grow(tmp_path):
    import resource

    model = Model()
    memory: list[tuple[int, int]] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *rest: object) -> None:
            if trainer.global_step in (500, 2000):
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                memory.append((torch.cuda.memory_allocated(), peak))
                torch.cuda.reset_peak_memory_stats()
            model.losses.clear()
            model.scales.clear()

    fit(model, 2000, tmp_path, callbacks=[QuartetQAT(), Watch()], max_epochs=-1)
    (device_early, host_early), (device_late, host_late) = memory
    assert device_late <= device_early
    assert host_late - host_early < 20_000  # kilobytes


@pytest.mark.skipif(importlib.util.find_spec("jsonargparse") is None, reason="needs jsonargparse")
def test_the_main_job(tmp_path, monkeypatch):
    from lightning_quartet.cli import main

    monkeypatch.chdir(ROOT)
    arguments = ["fit", "--config", "examples/language_model/config.yaml", "--trainer.max_steps", "200"]
    arguments += ["--trainer.accelerator", "gpu", "--trainer.devices", "1", "--trainer.precision", "bf16-mixed"]
    arguments += ["--trainer.logger.init_args.save_dir", str(tmp_path)]
    assert main(arguments) == 0
    assert list(tmp_path.rglob("loss_curve.png"))
    checkpoints = list(tmp_path.rglob("*.ckpt"))
    assert checkpoints
    saved = torch.load(checkpoints[0], map_location="cpu", weights_only=True)
    assert any("QuartetQAT" in key for key in saved["callbacks"])
    assert QuartetConfig.from_dict(saved["callbacks"]["QuartetQAT"]["config"]) == QuartetConfig()
    score = next(float(v["best_model_score"]) for k, v in saved["callbacks"].items() if "ModelCheckpoint" in k)
    assert score < 6.1
