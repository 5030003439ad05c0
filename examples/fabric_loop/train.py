"""A training loop of one's own, without a Trainer: Fabric with MXFP4 matrix products as its precision.

python examples/fabric_loop/train.py [STEPS]
"""

import sys
from itertools import islice

import torch
from lightning.fabric import Fabric
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_quartet import QuartetPrecision
from lightning_quartet.recipes import TextDataModule


def main(steps: int = 50, path: str = "examples/language_model/sotu.txt.xz") -> list[float]:
    fabric = Fabric(devices=1, plugins=QuartetPrecision("32-true", config="quartet"))
    fabric.seed_everything(1)

    data = TextDataModule(path, vocabulary_size=2048, sequence_length=128, batch_size=4)
    data.prepare_data()
    data.setup("fit")
    batches = fabric.setup_dataloaders(data.train_dataloader())

    config = LlamaConfig(
        vocab_size=2048, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=4e-3))

    losses = []
    for step, batch in enumerate(islice(batches, steps)):
        loss = model(input_ids=batch, labels=batch).loss
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 10 == 0 or step == steps - 1:
            fabric.print(f"step {step}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
