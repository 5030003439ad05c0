"""Two GPUs, connected by NCCL, train like one."""

from collections.abc import Iterator

import pytest
import scenarios
import torch
from processes import Ranks
from test_faults import check_resumes

from lightning_quartet import QuartetConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")]

EXACT = QuartetConfig(randomize_backward=False, accumulation="precise")
WAYS = ("ddp", "fsdp1", "quartet_fsdp")
GPU = {"accelerator": "gpu"}


@pytest.fixture(scope="module")
def gpus() -> Iterator[Ranks]:
    """Two processes with a GPU each."""
    pool = Ranks(2)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def one_gpu() -> dict[str, object]:
    """Fifty steps of one process."""
    pool = Ranks(1)
    (result,) = pool(scenarios.train, world_size=1, steps=50, config=EXACT, **GPU)
    pool.close()
    return result


@pytest.mark.parametrize("strategy", WAYS)
def test_fifty_steps_of_sgd_give_the_losses_of_one_gpu(gpus, one_gpu, strategy, record_property):
    results = gpus(scenarios.train, strategy=strategy, steps=50, config=EXACT, **GPU)
    losses, reference = scenarios.mean_losses(results), scenarios.mean_losses([one_gpu])
    relative = ((losses - reference).abs() / reference).max().item()
    record_property("largest_relative_difference", relative)
    assert reference[-1] < 0.9 * reference[0]  # it learns
    assert relative <= 1e-5
    for name, weight in one_gpu["weights"].items():
        assert (results[0]["weights"][name] - weight).norm() <= 1e-4 * weight.norm(), name


def test_resume_is_bit_for_bit(gpus, tmp_path):
    model = {"optimizer": "AdamW", "lr": 1e-3}
    for result in gpus(scenarios.train_and_resume, folder=str(tmp_path), model=model, **GPU):
        assert result["first"]["losses"] + result["second"]["losses"] == result["whole"]["losses"]
        for name, weight in result["whole"]["weights"].items():
            assert torch.equal(result["second"]["weights"][name], weight), name


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_compiled_blocks_train_in_bfloat16(gpus, precision):
    options = {"steps": 3, "precision": precision, "model": {"compiled": True}, **GPU}
    packed = gpus(scenarios.train, fsdp={}, config=EXACT, **options)
    plain = gpus(scenarios.train, fsdp={"packed": False}, config=EXACT, **options)
    torch.testing.assert_close(scenarios.mean_losses(packed), scenarios.mean_losses(plain), rtol=2e-2, atol=0)


def test_a_killed_rank_ends_the_job_which_then_resumes(tmp_path):
    check_resumes(tmp_path, 1, "--accelerator", "gpu")
