"""A long run holds nothing: not memory, not compiled graphs."""

import gc
import resource

import pytest
import torch
from toy import Toy, make, trainer

from lightning_quartet import QuartetQAT


class Watching(Toy):
    """Compiled blocks; notes memory on the way."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0, batches=2000)
        self.net.compile(backend="aot_eager")
        self.memory: list[tuple[int, int, int]] = []

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx % 500 == 499 or batch_idx == 250:
            gc.collect()
            tensors = sum(isinstance(o, torch.Tensor) for o in gc.get_objects())
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            self.memory.append((tensors, graphs, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))

    def training_step(self, batch, batch_idx):
        return self.loss(batch)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_thousand_steps_do_not_grow():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = make(Watching)
    trainer(callbacks=[QuartetQAT("quartet_stochastic")], limit_val_batches=0).fit(model)
    assert len(model.memory) == 5
    (tensors, graphs, memory), last = model.memory[0], model.memory[-1]
    assert last[0] <= tensors + 5
    assert 0 < graphs == last[1]
    assert last[2] <= memory + 30 * 1024  # KiB
