"""Moments in a device's time, taken without waiting for it."""

import time
from typing import Any

import torch


def now(device: torch.device) -> Any:
    """A moment in a GPU's time, or in the host's where there is none."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def is_over(moment: Any) -> bool:
    """Whether the device has come to it."""
    return isinstance(moment, float) or moment.query()


def seconds(start: Any, end: Any) -> float:
    """Between two moments that are over."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000
