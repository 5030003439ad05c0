"""AdamW with linear warm-up and cosine decay, as the recipes train."""

from __future__ import annotations

import math

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig


def adamw(
    module: LightningModule,
    learning_rate: float,
    final_learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    warmup_steps: int,
) -> OptimizerLRSchedulerConfig:
    """Optimizer and schedule over all steps of the module's Trainer; vectors (norms, biases) are not decayed.

    Args:
        module: What to train: its parameters that require gradients.
        learning_rate: The peak, reached after ``warmup_steps``.
        final_learning_rate: The value at the last step, as a fraction of ``learning_rate``.
        weight_decay: Of matrices.
        betas: Of AdamW.
        warmup_steps: Optimizer steps of linear warm-up.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=betas)
    steps = module.trainer.estimated_stepping_batches

    def rate(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        done = min(1.0, (step - warmup_steps) / max(1.0, steps - warmup_steps))
        return final_learning_rate + (1 - final_learning_rate) * 0.5 * (1 + math.cos(math.pi * done))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
