"""QuartetFSDP: what it sends, whatever it is combined with, and what it refuses."""

import pytest
import scenarios
import torch
from processes import Failure
from scenarios import Block, Net
from torch import nn

from lightning_quartet import QuartetConfig, QuartetFSDP, QuartetLinear
from lightning_quartet.gathered import GatheredWeight, ShardedWeight
from lightning_quartet.strategies.fsdp import _pack_when_gathered, find_blocks
from quartet_kernels import quantize_mxfp4


class Mesh:
    def __init__(self, size):
        self.ranks = size

    def size(self):
        return self.ranks


@pytest.mark.parametrize("ranks_", [1, 2, 3, 5, 24])
def test_shards_of_any_number_of_rows_gather_to_the_whole_quantised_weight(ranks_):
    weight, config = torch.randn(32, 64), QuartetConfig()
    rows = -(-32 // ranks_)
    shards = [ShardedWeight(weight[r * rows : (r + 1) * rows], 32, config) for r in range(ranks_)]
    sent = [shard.fsdp_pre_all_gather(Mesh(ranks_))[0] for shard in shards]
    shapes = {((rows, 32), (rows, 2))} if ranks_ > 1 else {((rows * 34,),)}
    assert {tuple(tuple(part.shape) for part in parts) for parts in sent} == shapes  # also from a rank without rows
    assert sum(part.nbytes for part in sent[0]) <= 0.54 * rows * 64
    for shard in shards:
        shard.in_backward = True
    again = [shard.fsdp_pre_all_gather(Mesh(ranks_))[0] for shard in shards]
    for parts, repeated in zip(sent, again, strict=True):
        assert all(map(torch.equal, parts, repeated))
    outputs = tuple(torch.cat(parts) for parts in zip(*sent, strict=True))
    gathered, inner = shards[0].fsdp_post_all_gather(outputs, None, torch.bfloat16)
    expected = quantize_mxfp4(weight, config=config)
    assert (gathered.shape, gathered.dtype) == ((32, 64), torch.bfloat16)
    # FSDP2 frees the outputs, fills them again, and gives the same weight back.
    kept = [output.clone() for output in outputs]
    for output, values in zip(outputs, kept, strict=True):
        output.untyped_storage().resize_(0)
        output.untyped_storage().resize_(values.nbytes)
        output.copy_(values)
    assert shards[0].fsdp_post_all_gather(outputs, None, torch.bfloat16, out=gathered) is None
    assert torch.equal(gathered.codes, expected.codes)
    assert torch.equal(gathered.scales, expected.scales)
    assert gathered.codes.is_contiguous()
    assert gathered.scales.is_contiguous()
    assert inner == ()


def test_a_gathered_weight_serves_nothing_but_its_layer():
    packed = quantize_mxfp4(torch.randn(32, 64))
    weight = nn.Parameter(GatheredWeight(packed.codes, packed.scales, torch.float32, QuartetConfig()))
    with pytest.raises(NotImplementedError, match="only QuartetLinear can use"):
        nn.functional.linear(torch.randn(2, 64), weight)


def test_weights_move_to_the_device_whole():
    layer = QuartetLinear(64, 32).requires_grad_(False)
    _pack_when_gathered(layer, [layer], torch.device("meta"))  # stands for a GPU
    assert (layer.weight.device.type, layer.weight.plain.device.type) == ("meta", "meta")
    assert not layer.weight.requires_grad


def test_blocks_are_the_members_of_lists():
    net = Net()
    assert find_blocks(net) == list(net.blocks)
    assert find_blocks(Net(checkpointing=True))[0]._checkpoint_wrapped_module is not None
    assert find_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))) == []
    stack = nn.Sequential(Block(32, 32), Block(32, 32))
    assert find_blocks(nn.ModuleDict({"stack": stack})) == list(stack)
    different = nn.Sequential(stack, nn.ModuleList([Block(32, 32), Block(32, 32)]))
    assert find_blocks(different) == [*stack, *different[1]]
    inner_first = [net.blocks[1].norm, net.blocks[1], net.blocks[0].norm, net.blocks[0]]
    assert find_blocks(net, ["Block", "LayerNorm"]) == inner_first


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("packed", [True, False])
def test_bytes_on_the_wire(ranks, packed, precision):
    (counts, _) = ranks(scenarios.count_bytes, fsdp={"packed": packed}, steps=2, precision=precision)
    size = 4 if precision == "32-true" else 2
    weights, others, root = 2 * 32 * 64, 64 + 64, 2 * (32 * 8) + 32 + 8  # elements
    block = (weights * (17 / 32 if packed else size) + others * size) / 2
    # The root once a step, two blocks in the forward and in the backward; sums in float32.
    assert counts["gathered"] == 2 * [root * size / 2, *4 * [block]]
    assert counts["reduced"] == 2 * [*2 * [(weights + others) * 4 / 2], root * 4 / 2]


def assert_same_losses(results, expected):
    losses, reference = scenarios.mean_losses(results), scenarios.mean_losses([expected])
    torch.testing.assert_close(losses, reference, rtol=1e-6, atol=0)


def assert_same_weights(results, expected):
    for name, weight in expected["weights"].items():
        assert (results[0]["weights"][name] - weight).norm() <= 1e-5 * weight.norm(), name


COMBINATIONS = {
    "frozen": {"model": {"frozen": True}},
    "checkpointing": {"model": {"checkpointing": True}},
    "compiled": {"model": {"compiled": True}},
    "checkpointing, compiled": {"model": {"checkpointing": True, "compiled": True}},
    "kept": {"fsdp": {"reshard_after_forward": False}},
    "not packed": {"fsdp": {"packed": False}},
    "block classes": {"fsdp": {"block_classes": ["Block", "Linear", "QuartetLinear"]}},
    "accumulation, each batch reduced": {
        "fsdp": {"reduce_every_batch": True},
        "data_steps": 6,
        "accumulate_grad_batches": 2,
    },
    "abs_max": {"config": QuartetConfig(forward_method="abs_max", randomize_backward=False)},
    "uneven": {"model": {"outputs": 7}},
    "momentum": {"model": {"optimizer": "AdamW", "lr": 1e-3}},
}


@pytest.mark.parametrize("combination", COMBINATIONS.values(), ids=COMBINATIONS)
def test_combinations_give_the_weights_of_one_process(ranks, combination):
    results = ranks(scenarios.train, **{"fsdp": {}, **combination})
    expected = scenarios.train(world_size=1, **{k: v for k, v in combination.items() if k != "fsdp"})
    assert_same_losses(results, expected)
    assert results[0]["weights"].keys() == expected["weights"].keys()
    assert_same_weights(results, expected)
    compiled = combination.get("model", {}).get("compiled", False)
    assert results[0]["graph_breaks"] == {}
    assert (results[0]["graphs"] > 0) == compiled


@pytest.mark.parametrize("masters", [True, False])
def test_adapters_train_like_in_one_process(ranks, masters):
    if not masters and torch.__version__ < "2.12":
        pytest.skip("refused by the test below")
    config = QuartetConfig(store_master_weights=masters, randomize_backward=False)
    options = {"config": config, "kind": scenarios.AdaptedNet, "model": {"lr": 0.1}, "steps": 4}
    results, expected = ranks(scenarios.train, fsdp={}, **options), scenarios.train(world_size=1, **options)
    assert_same_losses(results, expected)
    before = scenarios.AdaptedNet().state_dict()
    for name, weight in expected["weights"].items():
        assert (results[0]["weights"][name].double() - weight.double()).norm() <= 1e-5 * weight.double().norm(), name
        if name in before:  # not codes
            assert torch.equal(weight, before[name]) == ("lora" not in name), name


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_layers_without_masters_are_gathered_as_they_are(ranks, precision):
    options = {"config": QuartetConfig(store_master_weights=False), "steps": 3, "precision": precision}
    if torch.__version__ < "2.12":
        with pytest.raises(Failure, match="torch 2.12 or newer"):
            ranks(scenarios.train, fsdp={}, **options)
        return
    results = ranks(scenarios.train, fsdp={}, **options)
    expected = ranks(scenarios.train, strategy="ddp", **options)
    losses, reference = scenarios.mean_losses(results), scenarios.mean_losses(expected)
    torch.testing.assert_close(losses, reference, rtol=1e-6 if precision == "32-true" else 1e-2, atol=0)
    for name, weight in expected[0]["weights"].items():
        if name.endswith(("codes", "scales")):
            assert torch.equal(results[0]["weights"][name], weight), name


@pytest.mark.skipif(torch.__version__ < "2.13", reason="refused where FSDP2 cannot forget")
@pytest.mark.parametrize("fail", ["forward", "backward", "stop"])
@pytest.mark.parametrize("fsdp", [{}, {"reshard_after_forward": False, "packed": False}], ids=str)
def test_a_fit_after_an_interrupted_one_is_like_in_one_process(ranks, fail, fsdp):
    losses = torch.tensor(ranks(scenarios.interrupt, fail=fail, fsdp=fsdp)).mean(0)
    expected = torch.tensor(scenarios.interrupt(world_size=1, fail=fail))
    assert len(expected) == 4
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)


def test_a_sharded_model_is_not_trained_by_another_strategy(ranks):
    with pytest.raises(Failure, match=r"sharded by another QuartetFSDP than this SingleDeviceStrategy; make the model"):
        ranks(scenarios.train_with_another_strategy)


@pytest.mark.parametrize(("kind", "gathers"), [(scenarios.Net, 5), (scenarios.Repeated, 2 * 2 * 5)])
def test_each_forward_gathers_everything_once_and_each_backward_the_blocks(ranks, kind, gathers):
    """Two blocks and the rest, with an optimizer step a backward or with less."""
    for counts in ranks(scenarios.count_bytes, fsdp={}, kind=kind, steps=2):
        assert len(counts["gathered"]) == 2 * gathers


REFUSALS = {
    "average": ({"averaging": "EMAWeightAveraging"}, "sharded modules cannot be copied"),
    "stochastic average": ({"averaging": "StochasticWeightAveraging"}, "sharded modules cannot be copied"),
    "phases": ({"qat": {"start_step": 3}}, r"choose QuartetFSDP\(packed=False\)"),
    "reverting": ({"qat": {"revert_on_end": True}}, r"choose QuartetFSDP\(packed=False\), or leave it out"),
    "backward": ({"kind": scenarios.Direct}, r"call self\.manual_backward\(loss\) instead of loss\.backward\(\)"),
    "master dtype": ({"qat": {"master_dtype": "float32"}}, "needs one dtype for all parameters"),
    "sharded": ({"kind": scenarios.ShardedNet}, "shards its layers itself"),
    "tied": ({"kind": scenarios.Tied}, "a parameter of another block too"),
    "no such class": ({"block_classes": ["Bloc"]}, "has no module of a class of that name"),
}


WAYS = [{}, {"reshard_after_forward": False}, {"packed": False}]


@pytest.mark.parametrize("fsdp", WAYS, ids=str)
def test_weights_written_inside_a_step_are_those_it_computes_with(ranks, fsdp):
    options = {"kind": scenarios.Disturbed, "steps": 4}
    results, expected = ranks(scenarios.train, fsdp=fsdp, **options), scenarios.train(1, **options)
    assert_same_losses(results, expected)
    assert_same_weights(results, expected)


@pytest.mark.parametrize("kind", [scenarios.Penalised, scenarios.Probed])
@pytest.mark.parametrize(("packed", "accumulate"), [(True, 1), (True, 2), (False, 1)])
def test_what_reads_a_weight_itself_gets_its_own_gradient(ranks, kind, packed, accumulate):
    options = {"kind": kind, "steps": 3, "accumulate_grad_batches": accumulate}
    results, expected = ranks(scenarios.train, fsdp={"packed": packed}, **options), scenarios.train(1, **options)
    assert_same_weights(results, expected)


@pytest.mark.parametrize(
    ("kind", "backwards"), [(scenarios.Repeated, 12), (scenarios.Prompted, 12), (scenarios.Toggling, 6)]
)
@pytest.mark.parametrize("fsdp", WAYS, ids=str)
def test_several_backwards_and_steps_in_one_training_step(ranks, fsdp, kind, backwards):
    options = {"kind": kind, "steps": 3}
    results, expected = ranks(scenarios.train, fsdp=fsdp, **options), scenarios.train(1, **options)
    assert len(expected["losses"]) == backwards
    assert_same_losses(results, expected)
    assert_same_weights(results, expected)


@pytest.mark.parametrize("kind", [scenarios.Outside, scenarios.Repeated])
@pytest.mark.parametrize("fsdp", WAYS, ids=str)
def test_hooks_and_monitor_find_shards_between_steps_and_other_methods_can_be_called(ranks, kind, fsdp):
    first, second = ranks(scenarios.look, kind=kind, fsdp=fsdp)
    expected = scenarios.look(world_size=1, kind=kind)
    assert set(first["seen"]) == {"Tensor" if fsdp.get("packed") is False else "ShardedWeight"}
    assert len(first["seen"]) == 4
    torch.testing.assert_close(first["described"], expected["described"], rtol=1e-5, atol=1e-6)
    assert torch.equal(first["described"], second["described"])
    assert_same_losses([first, second], expected)
    assert any(name.startswith("quartet/middle/weights") for name in first["measured"])
    for name, value in first["measured"].items():
        if "/weights/" in name:
            assert value == pytest.approx(expected["measured"][name], rel=1e-4), name


@pytest.mark.parametrize(("options", "message"), REFUSALS.values(), ids=REFUSALS)
def test_refusals_are_one_sentence(ranks, options, message):
    with pytest.raises(Failure, match=message) as failure:
        ranks(scenarios.refuse, **options)
    assert failure.value.name == "MisconfigurationException"
    assert "\n" not in failure.value.message


def test_unknown_precision_of_sums():
    with pytest.raises(ValueError, match="choose 'float32' or 'bfloat16'"):
        QuartetFSDP(reduce_dtype="float16")


def test_a_model_on_the_meta_device(ranks):
    for result in ranks(scenarios.train_from_meta):
        assert result["sharded"] == [f"blocks.{i}.{name}.weight" for i in range(2) for name in ("up", "down")]
        assert result["devices"] == {"cpu"}
        assert all(0.3 < loss < 5 for loss in result["losses"])


@pytest.mark.parametrize(
    ("precision", "computed", "master"),
    [
        ("32-true", torch.float32, torch.float32),
        ("bf16-mixed", torch.bfloat16, torch.float32),
        ("bf16-true", torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtypes(ranks, precision, computed, master):
    for result in ranks(scenarios.dtypes, precision=precision):
        assert result["kind"] == "GatheredWeight"
        assert (result["up"], result["norm"], result["master"]) == (computed, computed, master)
        assert all(0.3 < loss < 5 for loss in result["losses"])


def test_validation_and_prediction_around_a_training(ranks):
    for before, after, shape in ranks(scenarios.everything_but_training):
        assert after < before
        assert shape == (2, 32, 8)
