"""A long run holds nothing: not memory, not compiled graphs, not cache entries."""

import gc
import resource

import pytest
import torch
from caches import cache_sizes
from toy import Toy, make, trainer

from lightning_quartet import QuartetQAT
from quartet_kernels.linear import weight_window


class Watching(Toy):
    """Compiled blocks; notes on the way what is held."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0, batches=2000)
        self.net.compile(backend="aot_eager")
        self.memory: list[int] = []
        self.held: list[dict[str, int]] = []

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx % 500 == 499 or batch_idx == 250:
            gc.collect()
            counters = torch._dynamo.utils.counters
            self.memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
            self.held.append(
                {
                    "tensors": sum(isinstance(o, torch.Tensor) for o in gc.get_objects()),
                    "graphs": counters["stats"]["unique_graphs"],
                    "graph breaks": sum(counters["graph_break"].values()),
                    "weights in the window": len(weight_window._projections),
                    **cache_sizes(),
                }
            )

    def training_step(self, batch, batch_idx):
        return self.loss(batch)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("accumulate", [1, 4])
def test_two_thousand_steps_do_not_grow(accumulate):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = make(Watching)
    callback = QuartetQAT("quartet_stochastic")
    trainer(callbacks=[callback], limit_val_batches=0, accumulate_grad_batches=accumulate).fit(model)
    assert len(model.held) == 5
    first, last = model.held[0], model.held[-1]
    assert last.pop("tensors") <= first.pop("tensors") + 5
    assert last == first
    assert first["graphs"] == 2  # one for each layer: what is compiled is what nn.Sequential calls
    assert first["graph breaks"] == 0
    assert model.memory[-1] <= model.memory[0] + 30 * 1024  # KiB
