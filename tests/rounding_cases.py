"""Inputs whose backward quantisation depends on rounding the product 3/4 v before the sum that follows."""

import torch
from torch import Tensor


def half_way() -> Tensor:
    """float32 [rows, 32] with one number a row: rotated, every element is plus or minus v, and 3/4 v is so close to the
    middle of two numbers of the grid that it is rounded to it, from the side on which the tie is not resolved."""
    factor = torch.tensor(32**-0.5)
    found = []
    for middle, below in ((3.5, True), (5.0, False)):  # ties go to 4, both times
        around = torch.tensor(middle / 0.75 / 32**-0.5)
        steps = torch.arange(-64, 65, dtype=torch.int32)
        x = (around.view(torch.int32) + steps).view(torch.float32)
        v = x * factor
        exact = v.double() * 0.75
        side = exact < middle if below else exact > middle
        found.append(x[(v * 0.75 == middle) & side])
    numbers = torch.cat(found)
    assert all(part.numel() for part in found)
    rows = torch.zeros(numbers.numel(), 32)
    rows[:, 5] = numbers
    return rows
