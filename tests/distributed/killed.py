"""A training of two processes that Lightning starts; one of them may kill itself in the middle of a step.

Usage: killed.py FOLDER [--kill RANK] [--accelerator gpu]
"""

import argparse
import json
import os
import signal
from pathlib import Path

import lightning.pytorch as pl
import scenarios
import torch
from torch import Tensor

from lightning_quartet import QuartetConfig, QuartetQAT

torch.set_num_threads(1)
parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("--kill", type=int)
parser.add_argument("--accelerator", default="cpu")
arguments = parser.parse_args()


class Mortal(scenarios.Net):
    def on_before_zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        # Between the forward and the backward.
        if self.global_rank == arguments.kill and self.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        with open(arguments.folder / f"losses{self.global_rank}.jsonl", "a") as file:
            file.write(json.dumps([self.global_step, self.losses[-1]]) + "\n")
        return loss


class Batches(pl.LightningDataModule):
    def train_dataloader(self) -> object:
        return scenarios.batches(2, 2, 2)


saves = pl.callbacks.ModelCheckpoint(arguments.folder, "last-{step}", every_n_epochs=1, save_top_k=-1)
last = sorted(arguments.folder.glob("last-*.ckpt"))
callbacks = [QuartetQAT(QuartetConfig()), saves]
trainer = scenarios.make_trainer(
    2, "quartet_fsdp", 3, callbacks=callbacks, enable_checkpointing=True, accelerator=arguments.accelerator
)
trainer.fit(Mortal(optimizer="AdamW", lr=1e-3), Batches(), ckpt_path=last[-1] if last else None)
# Else gloo's threads may outlive what they use when Python exits: "terminate called without an active exception".
os._exit(0)
