"""Training through the Trainer on a GPU: the main job, a real gradient scaler, exact resume, no growth of memory."""

import gc
import importlib.util
import math
import resource
from itertools import pairwise
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from caches import cache_sizes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_quartet import QuartetPrecision, QuartetQAT
from quartet_kernels import QuartetConfig
from quartet_kernels.rotation import _matrix

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

ROOT = Path(__file__).parents[2]


class Model(pl.LightningModule):
    """An autoencoder with dropout.

    Args:
        poison: Where the batch of step 5 leaves float16: "loss", "activation", "gradient".
        checkpointing: Whether activations are made anew in the backward.
    """

    def __init__(self, poison: str | None = None, checkpointing: bool = False) -> None:
        super().__init__()
        self.poison, self.checkpointing = poison, checkpointing
        self.net = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Dropout(0.1), nn.Linear(512, 256))
        self.scales: list[float] = []
        self.losses: list[Tensor] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        poison = self.poison if self.global_step == 5 else None
        x = batch * 1e7 if poison == "activation" else batch
        out = checkpoint(self.net, x, use_reentrant=False) if self.checkpointing else self.net(x)
        loss = (out - batch).square().mean()
        if poison == "loss":
            loss = loss * math.inf
        if poison == "gradient":
            loss = loss + 1e8 * (loss - loss.detach())  # the value stays
        self.losses.append(loss.detach())
        return loss

    def on_train_batch_end(self, *arguments: object) -> None:
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            self.scales.append(scaler.get_scale())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)

    # Lightning saves no random state; dropout of a resumed run needs it.
    def on_save_checkpoint(self, state: dict[str, object]) -> None:
        state["rng"] = torch.cuda.get_rng_state()

    def on_load_checkpoint(self, state: dict[str, Tensor]) -> None:
        torch.cuda.set_rng_state(state["rng"].cpu())


def data(batches: int = 20) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(torch.randn(batches * 64, 256, generator=generator), batch_size=64)


def fit(
    model: pl.LightningModule,
    steps: int,
    tmp_path: Path,
    resume: str | None = None,
    loaders: tuple[DataLoader, ...] | None = None,
    **options: object,
) -> pl.Trainer:
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
    trainer.fit(model, *(loaders or (data(),)), ckpt_path=resume)
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


@pytest.mark.parametrize("how", ["callback", "plugin"])
@pytest.mark.parametrize("poison", ["loss", "activation", "gradient"])
def test_a_gradient_scaler_skips_a_step_that_overflows_and_recovers(how, poison, tmp_path):
    pl.seed_everything(0)
    model = Model(poison)
    after: list[Tensor] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, *arguments: object) -> None:
            after.append(model.net[3].weight.detach().clone())

    if how == "callback":
        trainer = fit(model, 12, tmp_path, callbacks=[QuartetQAT(), Watch()], precision="16-mixed")
    else:
        plugins = [QuartetPrecision("16-mixed")]
        trainer = fit(model, 12, tmp_path, callbacks=[Watch()], precision=None, plugins=plugins)
    assert trainer.global_step == 12
    assert torch.stack(model.losses).isfinite().tolist() == [i != 5 or poison == "gradient" for i in range(12)]
    assert model.scales == [65536.0] * 5 + [32768.0] * 7
    moved = [not torch.equal(a, b) for a, b in pairwise(after)]
    assert moved == [True] * 4 + [False] + [True] * 6
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("recipe", ["quartet", "quartet_stochastic"])
def test_resume_is_exact(recipe, checkpointing, tmp_path):
    """Two epochs of 10 steps of two batches, with dropout, next to one and one; bit for bit."""

    def options(epochs: int) -> dict[str, object]:
        # Bounded by epochs: after `max_steps` at the end of one, Lightning 2.6 drops a batch on resuming.
        return {
            "callbacks": [QuartetQAT(recipe)],
            "deterministic": True,
            "accumulate_grad_batches": 2,
            "max_steps": -1,
            "max_epochs": epochs,
        }

    def new() -> Model:
        pl.seed_everything(0)
        return Model(checkpointing=checkpointing)

    whole = new()
    whole_trainer = fit(whole, 20, tmp_path, **options(2))
    first = new()
    trainer = fit(first, 10, tmp_path, **options(1))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    second = new()
    torch.cuda.manual_seed(77)
    trainer = fit(second, 20, tmp_path, resume=str(tmp_path / "half.ckpt"), **options(2))
    assert whole_trainer.global_step == trainer.global_step == 20
    for (name, value), expected in zip(second.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(value.cpu(), expected.cpu()), name
    states = [t.optimizers[0].state_dict()["state"] for t in (whole_trainer, trainer)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert torch.equal(torch.stack(first.losses + second.losses), torch.stack(whole.losses))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("compiled", [False, True])
def test_two_thousand_steps_do_not_grow(compiled, tmp_path):
    """Host and device memory, compiled graphs, cached kernels: noted after 500 steps and at the end."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Model()
    if compiled:
        model.net.compile(fullgraph=True)
    memory: list[tuple[int, int, int]] = []
    held: list[dict[str, int]] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *rest: object) -> None:
            model.losses.clear()
            model.scales.clear()
            if trainer.global_step in (500, 2000):
                gc.collect()
                torch.cuda.synchronize()
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                memory.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), peak))
                graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
                held.append({"graphs": graphs, **cache_sizes()})

    fit(model, 2000, tmp_path, callbacks=[QuartetQAT(), Watch()], max_epochs=-1)
    early, late = memory
    assert late[0] <= early[0]
    assert late[1] <= early[1]
    assert late[2] - early[2] < 30_000  # kilobytes
    assert held[0] == held[1]
    assert (held[0]["graphs"] > 0) == compiled
    assert sum(count for name, count in held[0].items() if name.endswith("_kernel")) > 0


@pytest.mark.parametrize("again", [False, True])
def test_cuda_graphs_of_compiled_layers_change_no_number(again, tmp_path):
    """With validations before and between, whose last batch is smaller."""
    from lightning_quartet.recipes import CausalLM

    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
    tokens = torch.randint(128, (36, 33), generator=torch.Generator().manual_seed(0))
    found = []
    for mode in ("reduce-overhead", "default"):
        torch._dynamo.reset()
        _matrix.cache_clear()  # else graphs would find what an earlier run made
        pl.seed_everything(0)
        model = CausalLM({**sizes, "num_hidden_layers": 2, "num_key_value_heads": 2}, compile_layers=mode)
        loaders = DataLoader(tokens[:32], batch_size=4), DataLoader(tokens, batch_size=8)
        callbacks = [QuartetQAT(QuartetConfig(recompute_inputs=again))]
        trainer = fit(model, 24, tmp_path, loaders=loaders, callbacks=callbacks)
        found.append((trainer.callback_metrics["val_loss"], model.state_dict()))
    assert trainer.global_step == 24
    torch.testing.assert_close(*found)


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
