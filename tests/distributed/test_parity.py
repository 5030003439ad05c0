"""Two processes train like one with the same global batch."""

import itertools

import pytest
import scenarios
import torch
from processes import Failure

from lightning_quartet import QuartetConfig


@pytest.fixture(scope="module")
def one_process():
    """``one_process(**options)`` of `scenarios.train`, each run made once."""
    known = {}

    def run(**options):
        key = repr(options)
        if key not in known:
            known[key] = scenarios.train(world_size=1, **options)
        return known[key]

    return run


WAYS = {
    "ddp": {"strategy": "ddp"},
    "fsdp1": {"strategy": "fsdp1"},
    "fsdp2": {"strategy": "fsdp2", "kind": scenarios.ShardedNet},
    "quartet_fsdp": {"strategy": "quartet_fsdp"},
    "tensor parallel": {"strategy": "tensor_parallel", "kind": scenarios.ParallelNet},
}


def relative(results, expected):
    losses = scenarios.mean_losses(results)
    reference = scenarios.mean_losses([expected])
    return ((losses - reference).abs() / reference).max().item()


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_fifty_steps_of_sgd_give_the_losses_of_one_process(ranks, one_process, way):
    results = ranks(scenarios.train, steps=50, **way)
    expected = one_process(steps=50)
    assert relative(results, expected) <= 1e-5
    assert expected["losses"][-1] < 0.9 * expected["losses"][0]  # it learns


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_two_steps_of_adamw_give_the_weights_of_one_process(ranks, one_process, way):
    options = {"steps": 2, "model": {"optimizer": "AdamW", "lr": 1e-3}}
    results = ranks(scenarios.train, **options, **way)
    expected = one_process(**options)
    assert relative(results, expected) <= 1e-6
    for name, weight in expected["weights"].items():
        # In norm: Adam's first steps go by the signs of gradients, also of those that are zero but for rounding.
        assert (results[0]["weights"][name] - weight).norm() <= 1e-5 * weight.norm(), name


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_adamw_stays_within_the_spread_of_perturbed_runs(ranks, one_process, way):
    """A difference of a rounding error flips a code now and then, and AdamW lets it grow; as much as here, no more."""

    def options(seed):
        return {"steps": 20, "model": {"optimizer": "AdamW", "lr": 1e-2, "perturbed": seed}}

    def distance(a, b):
        return ((a - b).abs() / b).mean().item()

    runs = [scenarios.mean_losses([one_process(**options(seed))]) for seed in range(6)]  # 0 is not perturbed
    spread = max(distance(a, b) for a, b in itertools.combinations(runs, 2))
    assert spread > 1e-4  # else nothing grew, and this test shows nothing
    assert distance(scenarios.mean_losses(ranks(scenarios.train, **options(0), **way)), runs[0]) <= spread


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_ranks_draw_different_bits_and_repeat_them(ranks, way):
    options = {"steps": 2, "config": QuartetConfig(seed=3), **way}
    first, second = ranks(scenarios.train, **options), ranks(scenarios.train, **options)
    for rank, (result, again) in enumerate(zip(first, second, strict=True)):
        replica = 0 if way["strategy"] == "tensor_parallel" else rank  # there, both have the same batches
        assert result["seeds"] == [[(3 << 32) | 3, step, replica << 16] for step in range(2)]
        assert result["losses"] == again["losses"]
    # What all ranks share stays the same on all.
    for name, weight in first[0]["weights"].items():
        assert torch.equal(weight, first[1]["weights"][name]), name
        assert torch.equal(weight, second[0]["weights"][name]), name


# Lightning clips no mixture of tensors and DTensors, which a model cut by tensor parallelism alone has.
@pytest.mark.parametrize("way", [WAYS[name] for name in ("ddp", "fsdp2", "quartet_fsdp")], ids=str)
def test_accumulation_and_clipping(ranks, one_process, way):
    options = {"steps": 2, "data_steps": 4, "accumulate_grad_batches": 2, "gradient_clip_val": 0.05}
    results = ranks(scenarios.train, **options, **way)
    assert [seed[2] & 0xFFFF for seed in results[0]["seeds"]] == [0, 1, 0, 1]
    expected = one_process(**options)
    assert relative(results, expected) <= 1e-6
    unclipped = one_process(**{**options, "gradient_clip_val": None})
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(results[0]["weights"][name], weight, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(unclipped["weights"]["lm_head.bias"], expected["weights"]["lm_head.bias"], rtol=1e-4)


def test_ranks_of_tensor_parallelism_keep_the_same_copies_of_what_is_whole(ranks):
    options = {"strategy": "tensor_parallel", "kind": scenarios.MixedNet, "steps": 10}
    first, second = ranks(scenarios.train, config=QuartetConfig(), **options)
    assert first["losses"] == second["losses"]
    for name in ("whole.weight", "embedding.weight"):
        assert torch.equal(first["weights"][name], second["weights"][name]), name


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_pieces_of_one_layer_round_independently(ranks, rounding):
    first, second = ranks(scenarios.halves, rounding=rounding)
    assert torch.equal(first, second) == (rounding == "nearest")
    assert (first - second).norm() < 0.5 * first.norm()


def test_tensor_parallelism_that_cuts_a_group_is_refused(ranks):
    with pytest.raises(Failure, match="must be a multiple of 32 x 2") as failure:
        ranks(scenarios.train, strategy="tensor_parallel", kind=scenarios.CutNet)
    assert failure.value.name == "MisconfigurationException"
