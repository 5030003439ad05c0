"""Packed 4-bit weights: equal to the training's forward, small, loadable, and a base for adapters."""

import copy
import gc
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from toy import assert_same, make, trainer, weights

from lightning_quartet import (
    PackedQuartetLinear,
    QuartetConfig,
    QuartetLinear,
    QuartetQAT,
    convert_to_quartet,
    pack_quartet,
    revert_from_quartet,
    set_quartet_step,
)
from quartet_kernels.rotation import rotation_matrix

CONFIGS = [
    QuartetConfig(),
    QuartetConfig(backward_dtype="bf16", transform_init="gsr"),
    QuartetConfig(backward_dtype="mxfp8"),
    QuartetConfig(forward_method="abs_max", backward_rounding="stochastic"),
    QuartetConfig(transform_init="identity"),
]


def layer(config=None, bias=True, dtype=torch.float32, sizes=(64, 96)):
    torch.manual_seed(0)
    return QuartetLinear(*sizes, bias=bias, dtype=dtype, config=config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_forward_and_input_gradient_are_those_of_the_training(config, dtype):
    trained = layer(config, dtype=dtype)
    packed = copy.deepcopy(trained)
    assert pack_quartet(packed) == 1
    x = torch.randn(2, 5, 64, dtype=dtype)
    results = []
    for module in (trained, packed):
        set_quartet_step(module, 3)
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad, module.bias.grad))
    assert_same(results[0], results[1])


def test_packed_weight_takes_17_bytes_for_32_elements_and_the_master_is_freed_at_once():
    model = nn.Sequential(layer(bias=False), layer(bias=False))
    first = weakref.ref(model[0].weight)
    alive = []
    model[1].register_parameter("weight", Watched(model[1].weight.data, first, alive))
    pack_quartet(model)
    gc.collect()
    assert first() is None
    assert alive == [False]  # while the second layer was packed
    assert [p.dtype for p in model.parameters()] == [torch.uint8] * 4
    assert sum(p.nbytes for p in model.parameters()) == 2 * 64 * 96 * 17 // 32
    assert not any(p.requires_grad for p in model.parameters())


class Watched(nn.Parameter):
    """Notes whether another tensor is alive when it is read."""

    def __new__(cls, data, other, alive):
        self = super().__new__(cls, data)
        self.other, self.alive = other, alive
        return self

    def detach(self):
        self.alive.append(self.other() is not None)
        return self.data


def test_state_dict_keys_and_safetensors(tmp_path):
    packed = layer()
    pack_quartet(packed)
    state = packed.state_dict()
    assert {name: (t.dtype, tuple(t.shape)) for name, t in state.items()} == {
        "weight_codes": (torch.uint8, (96, 32)),
        "weight_scales": (torch.uint8, (96, 2)),
        "bias": (torch.float32, (96,)),
        "_extra_state": (torch.uint8, (17,)),
    }
    assert bytes(state["_extra_state"].tolist()) == b"quest hadamard 32"
    save_file(state, tmp_path / "a.safetensors")
    other = QuartetLinear(64, 96, config=QuartetConfig(store_master_weights=False))
    pack_quartet(other)
    other.load_state_dict(load_file(tmp_path / "a.safetensors"))
    x = torch.randn(3, 64)
    assert torch.equal(other(x), packed(x))


@pytest.mark.parametrize(
    "config",
    [
        QuartetConfig(transform_init="gsr"),
        QuartetConfig(forward_method="abs_max"),
        QuartetConfig(hadamard_group_size=64),
    ],
    ids=str,
)
def test_codes_of_another_rotation_are_refused_and_those_that_do_not_say_it_are_taken(config):
    packed, other = layer(), layer(config)
    for module in (packed, other):
        pack_quartet(module)
    before = weights(other)
    with pytest.raises(RuntimeError, match=r"codes of 'quest hadamard 32' and the layer computes with .*config"):
        other.load_state_dict(packed.state_dict())
    assert_same(before, weights(other))
    state = packed.state_dict()
    del state["_extra_state"]
    other.load_state_dict(state)
    assert torch.equal(other.weight_codes, packed.weight_codes)


def test_a_training_checkpoint_is_packed_while_it_is_loaded():
    trained = layer()
    packed = layer(sizes=(64, 96))
    with torch.no_grad():
        packed.weight.zero_()
    pack_quartet(packed)
    packed.load_state_dict(trained.state_dict())
    x = torch.randn(3, 64)
    assert torch.equal(packed(x), trained(x))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("weight_codes", lambda t: t.float(), "weight_codes is torch.float32"),
        ("weight_scales", lambda t: t.to(torch.int8), "weight_scales is torch.int8"),
        ("weight_codes", lambda t: t[:, :-1].clone(), "size mismatch"),
        ("weight_scales", lambda t: t[:-1], "size mismatch"),
    ],
)
def test_wrong_dtypes_and_shapes_are_refused_by_load_state_dict(name, change, message):
    packed = layer()
    pack_quartet(packed)
    before = weights(packed)
    state = packed.state_dict()
    with pytest.raises(RuntimeError, match=message):
        packed.load_state_dict({**state, name: change(state[name])})
    assert_same(before, weights(packed))


def test_wrong_training_weights_are_refused():
    packed = layer()
    pack_quartet(packed)
    for wrong in (torch.zeros(96, 32), torch.zeros(96, 64, dtype=torch.int64)):
        with pytest.raises(RuntimeError, match="to be packed"):
            packed.load_state_dict({"weight": wrong, "bias": torch.zeros(96)})


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_dequantized_weight_is_the_matrix_in_the_unrotated_basis(config):
    trained = layer(config)
    dense = trained.dequantized_weight()
    assert 0 < (dense - trained.weight).square().sum() / trained.weight.square().sum() < 0.03
    matrix = trained.quantized_weight().dequantize()
    if config.transform_init == "identity":
        assert torch.equal(dense, matrix)
    else:
        h = rotation_matrix(config.transform_init, 32, torch.device("cpu")) * 32**-0.5
        expected = (matrix.double().view(96, 2, 32) @ h.double().t()).view(96, 64)
        torch.testing.assert_close(dense.double(), expected, rtol=0, atol=1e-7)
    packed = copy.deepcopy(trained)
    pack_quartet(packed)
    assert torch.equal(packed.dequantized_weight(), dense)
    assert packed.dequantized_weight(torch.bfloat16).dtype == torch.bfloat16


def test_reverting_gives_a_linear_with_the_dequantised_weight():
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64, bias=False))
    convert_to_quartet(model)
    pack_quartet(model)
    model.to(torch.bfloat16)
    expected = model[0].dequantized_weight(torch.bfloat16)
    assert revert_from_quartet(model) == 2
    assert [type(m) for m in model] == [nn.Linear] * 2
    assert list(model[1].state_dict()) == ["weight"]
    assert model[1].weight.dtype == torch.bfloat16
    assert torch.equal(model[0].weight, expected)
    assert model(torch.randn(2, 64, dtype=torch.bfloat16)).shape == (2, 64)


def test_disabled_layers_multiply_with_the_dequantised_weight():
    packed = layer()
    pack_quartet(packed)
    packed.quartet_enabled = False
    x = torch.randn(3, 64)
    assert torch.equal(packed(x), nn.functional.linear(x, packed.dequantized_weight(), packed.bias))


def test_layers_that_share_a_weight_share_the_codes():
    model = nn.Sequential(layer(), layer())
    model[1].weight = model[0].weight
    assert pack_quartet(model) == 2
    assert model[0].weight_codes is model[1].weight_codes
    assert pack_quartet(model) == 0
    with torch.inference_mode():
        revert_from_quartet(model)
    assert model[0].weight is model[1].weight
    model[0](torch.randn(3, 64)).sum().backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("how", ["config", "variable"])
def test_weights_on_the_cpu_are_packed_whatever_the_backend_of_the_training(how, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    config = QuartetConfig(backend="fp8" if how == "config" else "auto")
    expected, packed = layer(), layer(config)
    if how == "variable":
        monkeypatch.setenv("QUARTET_BACKEND", "fp8")
    assert torch.equal(packed.dequantized_weight(), packed.dequantized_weight())
    pack_quartet(packed)
    monkeypatch.delenv("QUARTET_BACKEND", raising=False)
    pack_quartet(expected)
    assert torch.equal(packed.weight_codes, expected.weight_codes)
    assert torch.equal(packed.weight_scales, expected.weight_scales)


def test_what_cannot_be_packed():
    with pytest.raises(TypeError, match="not dict"):
        pack_quartet({})
    with pytest.raises(ValueError, match=r"call convert_to_quartet\(module\) first"):
        pack_quartet(nn.Linear(32, 32))


def test_meta_layers_are_packed_without_data():
    packed = layer().to("meta")
    pack_quartet(packed)
    assert packed.weight_codes.device.type == "meta"
    other = layer()
    pack_quartet(other)
    packed.load_state_dict(other.state_dict(), assign=True)
    x = torch.randn(3, 64)
    packed._quartet_seed = other._quartet_seed
    assert torch.equal(packed(x), other(x))


# In a Trainer --------------------------------------------------------------------------------------------------------


def test_callback_packs_at_setup_and_trains_what_is_left(tmp_path):
    trained = make()
    trainer(callbacks=[QuartetQAT()], limit_train_batches=3).fit(trained)
    expected = torch.cat(trainer(callbacks=[QuartetQAT()]).predict(trained))
    trainer_ = trainer(callbacks=[QuartetQAT()])
    trainer_.strategy.connect(trained)
    trainer_.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)

    config = QuartetConfig(store_master_weights=False)
    model = make()
    t = trainer(callbacks=[QuartetQAT(config)])
    assert torch.equal(torch.cat(t.predict(model, ckpt_path=tmp_path / "a.ckpt")), expected)
    assert isinstance(model.net[0], PackedQuartetLinear)

    before = weights(model)
    trainer(callbacks=[QuartetQAT(config)], limit_train_batches=3).fit(model)
    for name, tensor in weights(model).items():
        assert torch.equal(tensor, before[name]) == ("weight_" in name or "_extra" in name), name
    t.save_checkpoint(tmp_path / "b.ckpt")
    again = make()
    t = trainer(callbacks=[QuartetQAT(config)])
    assert_same(t.predict(again, ckpt_path=tmp_path / "b.ckpt"), t.predict(model))


def test_callback_reverts_packed_layers():
    model = make()
    t = trainer(callbacks=[QuartetQAT(QuartetConfig(store_master_weights=False), revert_on_end=True)])
    t.predict(model)
    assert type(model.net[0]) is nn.Linear


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_precisions_leave_the_codes_alone(precision):
    model = make()
    callback = QuartetQAT(QuartetConfig(store_master_weights=False), master_dtype="float32")
    trainer(callbacks=[callback], precision=precision, limit_train_batches=2).fit(model)
    assert model.net[0].weight_codes.dtype == torch.uint8
    assert model.net[0].bias.dtype == torch.float32


def test_compile_and_inference_mode():
    model = nn.Sequential(layer(), nn.ReLU(), layer(sizes=(96, 32)))
    pack_quartet(model)
    x = torch.randn(4, 64)
    with torch.inference_mode():
        expected = model(x)
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), expected)
    leaf = x.clone().requires_grad_()
    model(leaf).sum().backward()
    other = x.clone().requires_grad_()
    compiled(other).sum().backward()
    assert torch.equal(leaf.grad, other.grad)
