"""Strategies for Lightning's Trainer; importing this makes ``Trainer(strategy="quartet_fsdp")`` known."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_quartet.strategies.fsdp import QuartetFSDP

StrategyRegistry.register(
    "quartet_fsdp",
    QuartetFSDP,
    description="FSDP2 that gathers the weights of QuartetLinear layers as 4-bit codes",
    override=True,  # a module that is imported twice is no error
)

__all__ = ["QuartetFSDP"]
