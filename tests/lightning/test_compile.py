"""torch.compile: one graph, no recompilation, the numbers of eager mode."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from lightning_quartet import convert_to_quartet, set_quartet_step


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


def blocks(recipe: str = "quartet_stochastic") -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 32), Block(), Block(), Block())
    convert_to_quartet(model, config=recipe)
    return model


TOKENS = torch.arange(8)


def step(root: nn.Module, call: Callable, number: int, micro_batch: int = 0) -> list[torch.Tensor]:
    set_quartet_step(root, number, micro_batch)
    root.zero_grad()
    call(TOKENS).square().sum().backward()
    return [p.grad.clone() for p in root.parameters()]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("recipe", ["quartet", "quartet_stochastic", "mxfp8_backward", "bf16_backward"])
def test_whole_model_is_one_graph_without_recompilation(recipe):
    eager, compiled = blocks(recipe), blocks(recipe)
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(compiled, backend=counter, fullgraph=True)
    for number in range(20):
        expected = step(eager, eager, number // 2, number % 2)
        for a, b in zip(expected, step(compiled, call, number // 2, number % 2), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_layers_and_blocks_of_one_shape_share_a_graph():
    eager, model = blocks(), blocks()
    counter = CompileCounter()
    for i in range(1, 4):
        model[i].compile(backend=counter, fullgraph=True)
    for number in range(3):
        for a, b in zip(step(eager, eager, number), step(model, model, number), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


def test_a_new_phase_recompiles_once():
    model, counter = blocks(), CompileCounter()
    call = torch.compile(model, backend=counter, fullgraph=True)
    layers = [m for m in model.modules() if hasattr(m, "quartet_enabled")]
    for number in range(4):
        for layer in layers:
            layer.quartet_enabled = number < 2
        step(model, call, number)
    assert counter.frame_count == 2


def test_inductor_gives_eagers_numbers():
    eager, compiled = blocks(), blocks()
    call = torch.compile(compiled, fullgraph=True)
    for number in range(2):
        for a, b in zip(step(eager, eager, number), step(compiled, call, number), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_conversion_after_compilation_is_honoured():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 32), Block(), Block(), Block())
    call = torch.compile(model, backend="eager")
    plain = call(TOKENS)
    convert_to_quartet(model)
    assert not torch.equal(call(TOKENS), plain)
    assert torch.equal(call(TOKENS), model(TOKENS))
