"""Two hundred steps with each recipe end within its documented band of the float32 run (docs/options.md)."""

import re
import statistics
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_quartet import QuartetQAT
from quartet_kernels import RECIPES

BANDS = {"quartet": 1.15, "quartet_stochastic": 1.17, "mxfp8_backward": 1.15, "bf16_backward": 1.15, "fp_quant": 1.2}
"""Largest ratio of the mean loss over the last 20 of 200 steps to that of the float32 run."""


class Student(pl.LightningModule):
    """Learns to classify what a random teacher network labels; logs nothing, keeps its losses."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 32))
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        x, label = batch
        loss = nn.functional.cross_entropy(self.net(x), label)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 2e-3)


def final_loss(recipe: str | None, seed: int = 0) -> float:
    pl.seed_everything(seed)
    teacher = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 32))
    x = torch.randn(200 * 64, 64)
    with torch.no_grad():
        labels = teacher(x).argmax(-1)
    student = Student()
    pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[] if recipe is None else [QuartetQAT(recipe)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(student, DataLoader(TensorDataset(x, labels), batch_size=64))
    assert len(student.losses) == 200
    return statistics.mean(student.losses[-20:])


def test_the_documents_have_these_bands():
    text = (Path(__file__).parents[2] / "docs" / "options.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|.*\| 0\.95 to ([\d.]+) \|$", text, re.MULTILINE)
    assert {recipe: float(band) for recipe, band in rows} == BANDS
    assert BANDS.keys() == RECIPES.keys()


@pytest.fixture(scope="module")
def float32_loss() -> float:
    return final_loss(None)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_lands_in_its_band(recipe, float32_loss):
    assert 0.95 * float32_loss < final_loss(recipe) < BANDS[recipe] * float32_loss
