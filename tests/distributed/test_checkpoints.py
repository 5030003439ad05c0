"""Checkpoints of QuartetFSDP: resumed bit for bit, and read without this package."""

import pytest
import scenarios
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

ADAM = {"optimizer": "AdamW", "lr": 1e-3}


@pytest.mark.parametrize("full", [False, True], ids=["sharded", "one file"])
def test_resume_is_bit_for_bit(ranks, tmp_path, full):
    for result in ranks(scenarios.train_and_resume, folder=str(tmp_path), full=full, model=ADAM):
        assert result["first"]["losses"] + result["second"]["losses"] == result["whole"]["losses"]
        assert result["second"]["seeds"] == result["whole"]["seeds"][2:]
        for name, weight in result["whole"]["weights"].items():
            assert torch.equal(result["second"]["weights"][name], weight), name


@pytest.mark.skipif(torch.__version__ < "2.12", reason="FSDP2 cannot shard packed weights there")
@pytest.mark.parametrize("full", [False, True], ids=["sharded", "one file"])
def test_layers_without_masters_resume(ranks, tmp_path, full):
    config = scenarios.QuartetConfig(store_master_weights=False)
    options = {"kind": scenarios.AdaptedNet, "model": ADAM, "config": config}
    for result in ranks(scenarios.train_and_resume, folder=str(tmp_path), full=full, **options):
        assert result["first"]["losses"] + result["second"]["losses"] == result["whole"]["losses"]


@pytest.mark.parametrize("full", [False, True], ids=["sharded", "one file"])
@pytest.mark.parametrize("weights_only", [False, True], ids=["whole", "weights only"])
def test_the_best_checkpoint_is_evaluated_after_a_fit(ranks, tmp_path, full, weights_only):
    for saved, found in ranks(scenarios.validate_the_best, folder=f"{tmp_path}", full=full, weights_only=weights_only):
        assert found == pytest.approx(saved, rel=1e-6)


@pytest.fixture(scope="module")
def sharded(ranks, tmp_path_factory):
    """A folder with a checkpoint of two ranks after two steps, and the weights."""
    path = tmp_path_factory.mktemp("sharded") / "checkpoint"
    options = {"steps": 2, "data_steps": 2, "model": ADAM}
    results = ranks(scenarios.train, strategy="quartet_fsdp", save=str(path), **options)
    return path, results[0]["weights"]


CONTINUED = {"steps": 4, "data_steps": 2, "model": ADAM}


def assert_continues(result, whole):
    """Two steps from the checkpoint end where four without it do: the optimizer's state came along."""
    assert len(result["losses"]) == 2
    for name, weight in whole["weights"].items():
        assert (result["weights"][name] - weight).norm() <= 1e-5 * weight.norm(), name


def test_two_ranks_to_one(alone, sharded):
    path, _ = sharded
    (result,) = alone(scenarios.train, world_size=1, strategy="quartet_fsdp", resume=str(path), **CONTINUED)
    assert_continues(result, scenarios.train(world_size=1, **CONTINUED))


def test_one_rank_to_two(ranks, alone, tmp_path):
    path, options = str(tmp_path / "checkpoint"), {"data_steps": 2, "model": ADAM}
    alone(scenarios.train, world_size=1, strategy="quartet_fsdp", steps=2, save=path, **options)
    results = ranks(scenarios.train, strategy="quartet_fsdp", resume=path, **CONTINUED)
    assert_continues(results[0], scenarios.train(world_size=1, **CONTINUED))


@pytest.mark.parametrize("strategy", ["quartet_fsdp", "fsdp2"])
def test_ddp_to_shards(ranks, tmp_path, strategy):
    path, options = str(tmp_path / "checkpoint"), {"data_steps": 2, "model": ADAM}
    ranks(scenarios.train, strategy="ddp", steps=2, save=path, **options)
    kind = scenarios.ShardedNet if strategy == "fsdp2" else scenarios.Net
    results = ranks(scenarios.train, strategy=strategy, kind=kind, resume=path, **CONTINUED)
    assert_continues(results[0], scenarios.train(world_size=1, **CONTINUED))


def test_another_strategy_goes_on_from_one_file(ranks, tmp_path):
    path = str(tmp_path / "checkpoint")
    options = {"data_steps": 2, "model": ADAM}
    ranks(scenarios.train, steps=2, fsdp={"save_distributed_checkpoint": False}, save=path, **options)
    whole = scenarios.train(world_size=1, **CONTINUED)
    assert_continues(ranks(scenarios.train, strategy="ddp", resume=path, **CONTINUED)[0], whole)
    assert_continues(scenarios.train(world_size=1, resume=path, **CONTINUED), whole)
    assert_continues(ranks(scenarios.train, strategy="quartet_fsdp", resume=path, **CONTINUED)[0], whole)


def test_a_sharded_checkpoint_becomes_a_plain_model(sharded, tmp_path):
    path, weights = sharded
    dcp_to_torch_save(path, tmp_path / "plain.pt")
    plain = scenarios.Net()
    plain.load_state_dict(torch.load(tmp_path / "plain.pt", weights_only=True)["state_dict"])
    for name, weight in weights.items():
        assert torch.equal(plain.state_dict()[name], weight), name


def test_no_class_of_this_package_is_in_a_checkpoint(sharded):
    path, _ = sharded
    found = set()
    for file in path.iterdir():
        data = file.read_bytes()
        assert b"gathered" not in data
        assert b"lightning_quartet" not in data
        found.add(file.suffix)
    assert {".distcp", ".pt"} <= found
