"""Under accumulation a weight is quantised once an optimizer step, and nothing else changes."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import WeightAveraging
from toy import Toy

from lightning_quartet import QuartetQAT
from quartet_kernels import linear


def fit(model: Toy, accumulate: int, callbacks: list[pl.Callback], **options) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        accumulate_grad_batches=accumulate,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(model)
    return trainer


@pytest.fixture
def quantised(monkeypatch):
    """Shapes of what is quantised: the toy's weights are [64, 32] and [32, 64], its batches are not."""
    shapes = []
    project = linear._project
    monkeypatch.setattr(
        linear, "_project", lambda x, config, mask: shapes.append(tuple(x.shape)) or project(x, config, mask)
    )
    return shapes


def run(monkeypatch=None, callbacks=None, accumulate=5, **options):
    pl.seed_everything(0)
    model = Toy()
    if monkeypatch is not None:
        monkeypatch.setattr(linear.WeightWindow, "open", lambda self, step: None)
    trainer = fit(model, accumulate, callbacks or [QuartetQAT()], limit_val_batches=0, **options)
    return model, trainer


def test_a_weight_is_quantised_once_an_optimizer_step(quantised):
    _, trainer = run()
    assert trainer.global_step == 4  # 2 epochs of 10 batches, 5 to a step
    assert quantised.count((64, 32)) == 4
    assert linear.weight_window.step is None


def test_without_accumulation_nothing_is_kept(quantised):
    _, trainer = run(accumulate=1)
    assert trainer.global_step == 20
    assert quantised.count((64, 32)) == 20
    assert linear.weight_window._projections == {}


def test_losses_and_weights_are_those_without_reuse(monkeypatch):
    model, _ = run()
    plain, _ = run(monkeypatch)
    assert model.losses == plain.losses
    for value, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(value, expected)


def test_weights_written_between_two_micro_batches_are_seen(monkeypatch):
    """In-place under no_grad, as a new tensor by ``copy_``, and by load_state_dict."""

    class Noisy(Toy):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            weight = self.net[0].weight
            with torch.no_grad():
                if batch_idx % 3 == 0:
                    weight.add_(0.1)
                elif batch_idx % 3 == 1:
                    weight.copy_(weight * 0.9)
                else:
                    self.load_state_dict({name: tensor * 1.1 for name, tensor in self.state_dict().items()})

    results = []
    for patched in (False, True):
        if patched:
            monkeypatch.setattr(linear.WeightWindow, "open", lambda self, step: None)
        pl.seed_everything(0)
        model = Noisy()
        fit(model, 5, [QuartetQAT()], limit_val_batches=0)
        results.append(model.losses)
    assert results[0] == results[1]


def test_validation_in_the_middle_of_a_step_sees_averaged_weights():
    """WeightAveraging swaps weights by ``.data``, which no version shows."""
    seen = []

    class Watch(pl.Callback):
        def on_validation_batch_end(self, trainer, module, *rest):
            x = torch.ones(4, 32)
            layer = trainer.lightning_module.net[0]
            seen.append(
                (layer(x), linear.quartet_linear(x, layer.weight.clone(), layer.bias, config=layer.quartet_config))
            )

    pl.seed_everything(0)
    fit(Toy(), 5, [QuartetQAT(), WeightAveraging(), Watch()], val_check_interval=3, limit_val_batches=1)
    assert seen
    assert all(torch.equal(first, second) for first, second in seen)


def test_an_exception_closes_the_window():
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 2:
                assert linear.weight_window.step is not None
                raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        run(callbacks=[QuartetQAT(), Stop()])
    assert linear.weight_window.step is None
