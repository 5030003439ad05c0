"""Two processes train like one with the same global batch."""

import pytest
import scenarios


@pytest.fixture(scope="module")
def one_process():
    """``one_process(**options)`` of :func:`scenarios.train`, each run made once."""
    known = {}

    def run(**options):
        key = repr(options)
        if key not in known:
            known[key] = scenarios.train(world_size=1, **options)
        return known[key]

    return run


WAYS = {
    "ddp": {"strategy": "ddp"},
    "fsdp2": {"strategy": "fsdp2", "kind": scenarios.ShardedNet},
    "quartet_fsdp": {"strategy": "quartet_fsdp"},
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
