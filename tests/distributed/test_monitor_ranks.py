"""QuartetMonitor measures over all ranks what one process measures."""

import math

import monitored
import pytest
import scenarios
from test_parity import WAYS


@pytest.fixture(scope="module")
def one_process() -> dict[str, float]:
    return monitored.watch(world_size=1, strategy="auto")


@pytest.mark.parametrize("name", WAYS)
def test_measures_are_those_of_one_process(ranks, one_process, name):
    way = WAYS[name]
    first, second = ranks(monitored.watch, strategy=way["strategy"], kind=way.get("kind", scenarios.Net))
    assert first == second  # every rank knows the sums
    missing = {
        "quartet_fsdp": ("_gradients/cosine", "_gradients/projection"),  # exact weights are not gathered
        "fsdp1": ("/weights/",),  # pieces of a flat buffer
        "tensor parallel": ("inputs", "gradients"),
    }.get(name, ())
    expected = {key: value for key, value in one_process.items() if not any(part in key for part in missing)}
    assert first.keys() == expected.keys()
    assert any(key.startswith("quartet/blocks.1.down/") for key in expected)
    for key, value in expected.items():
        # Each rank's weight gradient is quantised on its own.
        tolerance = 0.05 if "weight_gradients" in key else 1e-6
        assert math.isclose(first[key], value, rel_tol=tolerance, abs_tol=1e-9), key


@pytest.mark.parametrize("strategy", ["ddp", "quartet_fsdp"])
def test_only_rank_zero_reports(ranks, strategy):
    first, second = ranks(scenarios.log_everything, strategy=strategy)
    assert sum("linear layers in MXFP4" in message for message in first["messages"]) == 1
    assert len(first["logged"]) == len(set(first["logged"])) == len(first["metrics"]) > 0
    assert (second["messages"], second["logged"]) == ([], [])
    assert first["metrics"] == second["metrics"]  # all ranks may act on them
