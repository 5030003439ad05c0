"""A model, data and Trainer small enough to run a training in a second."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_quartet import QuartetLinear


class Toy(pl.LightningModule):
    """An autoencoder with dropout; notes what happened in each training step.

    Args:
        checkpointing: ``None``, or ``use_reentrant`` of activation checkpointing.
    """

    def __init__(self, checkpointing: bool | None = None, dropout: float = 0.1, batches: int = 10, lr: float = 1e-2):
        super().__init__()
        self.checkpointing, self.batches, self.lr = checkpointing, batches, lr
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Dropout(dropout), nn.Linear(64, 32))
        self.head = nn.Linear(32, 5)
        self.losses: list[float] = []
        self.notes: list[tuple[int, bool, list[int]]] = []  # (global step, enabled, seed)

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointing is None:
            return self.net(x)
        return checkpoint(self.net, x.clone().requires_grad_(), use_reentrant=self.checkpointing)

    def loss(self, batch: Tensor) -> Tensor:
        out = self(batch)
        return (out - batch).square().mean() + self.head(out).square().mean()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        layer = next(iter(self.net.children()))
        if isinstance(layer, QuartetLinear) and not torch.compiler.is_compiling():
            self.notes.append((self.global_step, layer.quartet_enabled, layer._quartet_seed.tolist()))
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.lr)

    def train_dataloader(self) -> DataLoader:
        return loader(self.batches, seed=0)

    def val_dataloader(self) -> DataLoader:
        return loader(2, seed=1)

    test_dataloader = predict_dataloader = val_dataloader

    # Lightning saves no random state; dropout of a resumed run needs it.
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rng"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        torch.set_rng_state(checkpoint["rng"])


class LateToy(Toy):
    """Makes its layers in ``configure_model``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))


def loader(batches: int, seed: int, batch_size: int = 4) -> DataLoader:
    data = torch.randn(batches * batch_size, 32, generator=torch.Generator().manual_seed(seed))
    return DataLoader(data, batch_size=batch_size)


def make(model: Callable[..., pl.LightningModule] = Toy, **options: Any) -> Any:
    """A model whose initial weights and random stream are always the same."""
    torch.manual_seed(1)
    return model(**options)


def trainer(**options: Any) -> pl.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(**{"accelerator": "cpu", "max_epochs": 1, **quiet, **options})


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(a: Any, b: Any) -> None:
    """Equality bit for bit of nested tensors and numbers."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    else:
        assert a == b
