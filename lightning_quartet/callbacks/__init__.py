"""Callbacks for the Trainer."""

from lightning_quartet.callbacks.monitor import QuartetMonitor
from lightning_quartet.callbacks.qat import QuartetQAT

__all__ = ["QuartetMonitor", "QuartetQAT"]
