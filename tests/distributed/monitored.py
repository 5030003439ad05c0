"""A training under QuartetMonitor, for the processes."""

from typing import Any

import scenarios
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_quartet import QuartetMonitor, QuartetQAT


def watch(world_size: int = 2, strategy: str = "ddp", kind: type[scenarios.Net] = scenarios.Net) -> dict[str, float]:
    """What the monitor measured last."""
    chosen: Any = {
        "fsdp1": lambda: scenarios.FSDP1(auto_wrap_policy={scenarios.Block}),
        "fsdp2": lambda: ModelParallelStrategy(data_parallel_size=world_size, tensor_parallel_size=1),
        "tensor_parallel": lambda: ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2),
    }.get(strategy, lambda: strategy)()
    monitor = QuartetMonitor(every_n_steps=1, rows=None)
    replicas = 1 if strategy == "tensor_parallel" else world_size
    trainer = scenarios.make_trainer(world_size, chosen, 1, callbacks=[QuartetQAT(scenarios.EXACT), monitor])
    trainer.fit(kind(lr=0.0), scenarios.batches(world_size, replicas, 2))
    return monitor.latest
