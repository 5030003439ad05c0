"""What needs more than two processes."""

import pytest
import scenarios
from processes import Ranks

pytestmark = pytest.mark.slow
STEPS = {"steps": 3, "model": {"optimizer": "AdamW", "lr": 1e-3}}


def assert_same_weights(results, expected):
    for name, weight in expected["weights"].items():
        assert (results[0]["weights"][name] - weight).norm() <= 1e-5 * weight.norm(), name


@pytest.fixture
def several(request):
    pool = Ranks(request.param)
    yield pool
    pool.close()


@pytest.mark.parametrize("several", [3], indirect=True)
def test_rows_that_do_not_divide_evenly(several, tmp_path):
    # Not one process: a mean over three scales gradients by what is no power of two, so other codes come out.
    options = {**STEPS, "global_batch": 3, "world_size": 3}
    results = several(scenarios.train, strategy="quartet_fsdp", **options)
    assert_same_weights(results, several(scenarios.train, strategy="ddp", **options)[0])
    options["folder"] = str(tmp_path)
    del options["steps"]
    for result in several(scenarios.train_and_resume, **options):
        assert result["first"]["losses"] + result["second"]["losses"] == result["whole"]["losses"]


@pytest.mark.parametrize("several", [4], indirect=True)
def test_fsdp2_times_tensor_parallel(several):
    results = several(
        scenarios.train,
        strategy="tensor_parallel",
        world_size=4,
        kind=scenarios.ParallelNet,
        **STEPS,
    )
    assert_same_weights(results, scenarios.train(world_size=1, **STEPS))
