"""convert_to_quartet, revert_from_quartet, set_quartet_step and QuartetLinear, without a Trainer."""

import copy
import io
import pickle
import threading
import warnings

import pytest
import torch
import torchmetrics
from identity_quantisers import take_out_quantisers
from torch import nn

import lightning_quartet.linear as quartet_linear_module
from lightning_quartet import (
    QuartetConfig,
    QuartetLinear,
    convert_to_quartet,
    pack_quartet,
    revert_from_quartet,
    set_quartet_step,
)
from quartet_kernels import RECIPES
from quartet_kernels.rotation import _matrix


class Llamaish(nn.Module):
    def __init__(self, layers: int = 12) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(
            nn.ModuleDict({"mlp": nn.Linear(32, 32), "attn": nn.Linear(32, 32)}) for _ in range(layers)
        )
        self.lm_head = nn.Linear(32, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.model.layers:
            x = x + layer["mlp"](layer["attn"](x))
        return self.lm_head(x)


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


# Which layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "kept"),
    [
        (None, {"lm_head"}),
        ([], set()),
        (["layers.1"], {"model.layers.1.mlp", "model.layers.1.attn"}),
        (["model.layers.3.mlp", "lm_head"], {"model.layers.3.mlp", "lm_head"}),
        (["layers.*.mlp"], {f"model.layers.{i}.mlp" for i in range(12)}),
        (["*head"], {"lm_head"}),
        (["model.layers.1[01].*"], {f"model.layers.{i}.{n}" for i in (10, 11) for n in ("mlp", "attn")}),
    ],
)
def test_patterns_match_whole_components(patterns, kept):
    model = Llamaish()
    report = convert_to_quartet(model, modules_to_not_convert=patterns)
    assert set(report.skipped) == kept
    plain = {name for name, m in model.named_modules() if type(m) is nn.Linear}
    assert plain == kept
    assert set(report.converted) == {name for name, m in model.named_modules() if isinstance(m, QuartetLinear)}


def test_wrappers_are_ignored_in_names():
    model = Llamaish(2)
    model.model.layers[0] = torch.compile(model.model.layers[0])
    report = convert_to_quartet(model, modules_to_not_convert=["layers.0.mlp"])
    assert list(report.skipped) == ["model.layers.0.mlp"]
    assert "model.layers.0.attn" in report.converted


def test_filter_function_and_report():
    model = Llamaish(2)
    seen = {}
    report = convert_to_quartet(
        model, module_filter_fn=lambda layer, name: seen.setdefault(name, layer) is layer and "mlp" in name
    )
    assert report.converted == ("model.layers.0.mlp", "model.layers.1.mlp")
    assert seen["model.layers.0.attn"] is model.model.layers[0]["attn"]
    text = str(report)
    assert "2 of 5 linear layers" in text
    assert "lm_head" in text
    assert len(text.splitlines()) == 4  # the last one says how little that is


def test_layers_that_do_not_fit_stay_with_a_reason():
    class MyLinear(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "narrow": nn.Linear(48, 32),
            "few": nn.Linear(32, 10),
            "sub": MyLinear(32, 32),
            "lazy": nn.LazyLinear(32),
            "integer": nn.Linear(32, 32),
            "patched": nn.Linear(32, 32),
            "good": nn.Linear(32, 32),
        }
    )
    model["integer"].weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    model["patched"].forward = lambda x: x
    report = convert_to_quartet(model)
    assert report.converted == ("good",)
    for name, word in [("narrow", "48"), ("few", "10"), ("sub", "MyLinear"), ("lazy", "lazy"),
                       ("integer", "int8"), ("patched", "forward")]:  # fmt: skip
        assert word in report.skipped[name]


def test_group_size_and_identity_decide_what_fits():
    config = QuartetConfig(hadamard_group_size=64)
    assert convert_to_quartet(two_layers(), config=config).converted == ("2",)
    config = QuartetConfig(hadamard_group_size=64, transform_init="identity")
    assert convert_to_quartet(two_layers(), config=config).converted == ("0", "2")


def test_a_single_linear_is_converted():
    layer = nn.Linear(32, 32)
    convert_to_quartet(layer)
    assert isinstance(layer, QuartetLinear)


def test_multihead_attention_keeps_its_projection():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 2), "mlp": nn.Linear(32, 32)})
    report = convert_to_quartet(model)
    assert report.converted == ("mlp",)
    assert "MultiheadAttention" in report.skipped["attention.out_proj"]


def test_transformer_encoder_is_quantised_in_evaluation_too():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True), 2)
    x = torch.randn(3, 5, 32)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = True
    encoder.eval()
    with torch.no_grad():
        plain = encoder(x)
    convert_to_quartet(encoder)
    quantised = encoder(x, src_key_padding_mask=padding)  # gradients are on: the slow path
    with torch.no_grad():
        evaluated = encoder(x, src_key_padding_mask=padding)
        assert not torch.allclose(plain, encoder(x))
    assert torch.equal(evaluated, quantised)
    revert_from_quartet(encoder)
    assert encoder.layers[0].activation_relu_or_gelu == 1
    assert encoder.use_nested_tensor
    with torch.no_grad():
        assert torch.equal(plain, encoder(x))


# What stays the same -----------------------------------------------------------------------------------------------


def test_conversion_keeps_parameters_hooks_and_flags():
    model = two_layers()
    model[0].weight.requires_grad_(False)
    model[2].eval()
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append("hook"))
    parameters, keys = list(model.parameters()), list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    convert_to_quartet(model)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == keys
    assert list(model.buffers()) == []
    assert not model[2].training
    before = [p.clone() for p in parameters]
    model(torch.randn(4, 32)).sum().backward()
    optimizer.step()
    assert calls == ["hook"]
    assert torch.equal(parameters[0], before[0])  # frozen
    assert not torch.equal(parameters[2], before[2])


def test_revert_is_the_inverse():
    model, x = two_layers(), torch.randn(4, 32)
    expected, attributes = model(x), set(model[0].__dict__)
    convert_to_quartet(model)
    assert not torch.equal(model(x), expected)
    assert revert_from_quartet(model) == 2
    assert type(model[0]) is nn.Linear
    assert set(model[0].__dict__) == attributes
    assert "_quartet_state" not in model.__dict__
    assert torch.equal(model(x), expected)
    assert revert_from_quartet(model) == 0


@pytest.mark.parametrize("recipe", [*RECIPES, "128", "gsr", "abs_max"])
def test_with_identity_quantisers_a_model_is_what_it_was(recipe, monkeypatch):
    """Embedding, attention, norms, tied weights: output and all gradients, but for float32 rounding."""
    changes = {
        "128": {"hadamard_group_size": 128},
        "gsr": {"transform_init": "gsr"},
        "abs_max": {"forward_method": "abs_max"},
    }
    config = QuartetConfig(**changes[recipe]) if recipe in changes else QuartetConfig.from_recipe(recipe)
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "embed": nn.Embedding(64, 128),
            "block": nn.TransformerEncoderLayer(128, 2, 256, dropout=0.0, batch_first=True),
            "out": nn.Linear(128, 64, bias=False),
        }
    )
    model["out"].weight = model["embed"].weight
    tokens = torch.randint(64, (3, 11))

    def results() -> list[torch.Tensor]:
        model.zero_grad()
        out = model["out"](model["block"](model["embed"](tokens)))
        out.square().mean().backward()
        return [out.detach(), *(p.grad.clone() for p in model.parameters())]

    expected = results()
    convert_to_quartet(model, config=config)
    set_quartet_step(model, 3)
    quantised = results()
    take_out_quantisers(monkeypatch)
    # Straight through, gradients are rounded to bfloat16 on their way into the products.
    tolerance = 1e-2 if config.backward_dtype == "bf16" else 1e-5
    for value, exact, rough in zip(results(), expected, quantised, strict=True):
        assert (value - exact).norm() < tolerance * exact.norm()
        assert (rough - exact).norm() > tolerance * exact.norm()


def test_disabled_layers_compute_as_linear():
    model, x = two_layers(), torch.randn(4, 32)
    expected = gradients(model, x)
    convert_to_quartet(model)
    model[0].quartet_enabled = model[2].quartet_enabled = False
    assert "quartet_enabled=False" in repr(model)
    for a, b in zip(expected, gradients(model, x), strict=True):
        assert torch.equal(a, b)


def test_tied_and_shared_modules():
    model = nn.ModuleDict({"embed": nn.Embedding(64, 32), "a": nn.Linear(32, 32), "out": nn.Linear(32, 64, bias=False)})
    model["out"].weight = model["embed"].weight
    model["again"] = model["a"]
    assert convert_to_quartet(model).skipped == {"out": "tied to an embedding"}
    revert_from_quartet(model)
    report = convert_to_quartet(model, modules_to_not_convert=[])
    assert report.converted == ("a", "out")
    assert model["out"].weight is model["embed"].weight
    set_quartet_step(model, 5)
    assert model["out"]._quartet_seed.tolist() == [1 << 32, 5, 0]
    # A shared module has two names, and a pattern for either counts.
    revert_from_quartet(model)
    assert "a" in convert_to_quartet(model, modules_to_not_convert=["again"]).skipped


def test_state_dicts_interchange_strictly():
    plain, quartet = two_layers(), two_layers()
    convert_to_quartet(quartet)
    for source, target in ((quartet, plain), (plain, quartet)):
        buffer = io.BytesIO()
        torch.save(source.state_dict(), buffer)
        for weights_only in (True, False):
            buffer.seek(0)
            target.load_state_dict(torch.load(buffer, weights_only=weights_only), strict=True)


def test_second_conversion_changes_nothing():
    model = two_layers()
    convert_to_quartet(model)
    set_quartet_step(model, 7)
    report = convert_to_quartet(model)
    assert report.converted == ()
    assert report.already_converted == ("0", "2")
    assert model[0]._quartet_seed.tolist() == [0, 7, 0]
    assert "2 of them before" in str(report)


def test_empty_batch_gives_empty_output():
    model = two_layers()
    convert_to_quartet(model)
    out = model(torch.randn(0, 32))
    assert out.shape == (0, 32)
    out.sum().backward()
    assert not model[0].weight.grad.any()


# Steps -------------------------------------------------------------------------------------------------------------


def test_step_layer_and_micro_batch_reach_every_layer():
    model = two_layers()
    convert_to_quartet(model, config=QuartetConfig(seed=9))
    set_quartet_step(model, 11, 3)
    assert model[0]._quartet_seed.tolist() == [9, 11, 3]
    assert model[2]._quartet_seed.tolist() == [(1 << 32) | 9, 11, 3]
    table = model[0]._quartet_seed.untyped_storage()
    assert table.data_ptr() == model[2]._quartet_seed.untyped_storage().data_ptr()


def test_rank_is_in_the_seed(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 5)
    model = two_layers()
    convert_to_quartet(model)
    set_quartet_step(model, 1, 2)
    assert model[0]._quartet_seed.tolist() == [0, 1, (5 << 16) | 2]


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_gradients_depend_on_step_and_repeat(rounding):
    model, x = two_layers(), torch.randn(8, 32)
    convert_to_quartet(model, config=QuartetConfig(backward_rounding=rounding))
    seen = []
    for step, micro_batch in ((0, 0), (0, 1), (1, 0), (0, 0)):
        set_quartet_step(model, step, micro_batch)
        seen.append(gradients(model, x)[0])
    assert torch.equal(seen[0], seen[3])
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


def test_advancing_the_step_does_not_disturb_a_pending_backward():
    model, x = two_layers(), torch.randn(8, 32)
    convert_to_quartet(model)
    set_quartet_step(model, 1)
    expected = gradients(model, x)
    model.zero_grad()
    loss = model(x).square().sum()
    set_quartet_step(model, 2)
    loss.backward()
    for a, b in zip(expected, [p.grad for p in model.parameters()], strict=True):
        assert torch.equal(a, b)


def test_layers_converted_later_are_numbered_with_the_rest():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    convert_to_quartet(model)
    set_quartet_step(model, 1)
    model.insert(0, nn.Linear(32, 32))
    convert_to_quartet(model[0])
    set_quartet_step(model, 2)
    assert [layer._quartet_seed.tolist() for layer in model] == [[i << 32, 2, 0] for i in range(3)]
    # The part's own numbering is gone; setting its step numbers it anew.
    set_quartet_step(model[2], 3)
    assert model[2]._quartet_seed.tolist() == [0, 3, 0]
    set_quartet_step(model, 4)
    assert model[2]._quartet_seed.tolist() == [2 << 32, 4, 0]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_independent(how):
    model, x = two_layers(), torch.randn(8, 32)
    convert_to_quartet(model)
    set_quartet_step(model, 1)
    expected = gradients(model, x)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    assert isinstance(other[0], QuartetLinear)
    assert other[0]._quartet_seed.untyped_storage().nbytes() == 24  # its own numbers, not the table of all layers
    assert other[0]._quartet_seed.tolist() == [0, 1, 0]
    set_quartet_step(model, 8)
    assert other[0]._quartet_seed.tolist() == [0, 1, 0]
    for a, b in zip(expected, gradients(other, x), strict=True):
        assert torch.equal(a, b)
    set_quartet_step(other, 9)
    assert model[2]._quartet_seed.tolist() == [1 << 32, 8, 0]
    assert other[2]._quartet_seed.tolist() == [1 << 32, 9, 0]


def test_meta_device_model_is_materialised_and_trains():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))
    convert_to_quartet(model)
    set_quartet_step(model, 3)
    model.to_empty(device="cpu")
    for layer in model:
        layer.reset_parameters()
    assert model[0]._quartet_seed.tolist() == [0, 3, 0]
    assert all(torch.isfinite(g).all() for g in gradients(model, torch.randn(4, 32)))


def test_networks_of_metrics_are_left_alone_and_a_small_share_is_said():
    class Distance(torchmetrics.Metric):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(32, 32)

        def update(self, x): ...

        def compute(self): ...

    model = nn.ModuleDict({"net": nn.Linear(32, 32), "metric": Distance(), "embedding": nn.Embedding(64, 32)})
    report = convert_to_quartet(model)
    assert report.converted == ("net",)
    assert report.skipped == {"metric.net": "part of a torchmetrics Metric, whose network is not trained"}
    assert report.share == 1024 / (1024 + 32 + 1056 + 2048)
    assert str(report).endswith("25% of the model's parameters are in MXFP4: only nn.Linear layers can be")
    pack_quartet(model)
    assert convert_to_quartet(model).share == report.share
    assert "parameters" not in str(convert_to_quartet(nn.Sequential(nn.Linear(32, 32))))


@pytest.mark.parametrize("transform", ["hadamard", "gsr"])
def test_the_default_device_is_not_ours(transform):
    config = QuartetConfig(transform_init=transform, backward_rounding="stochastic")
    expected = two_layers()
    convert_to_quartet(expected, config=config)
    set_quartet_step(expected, 3)
    model, x = two_layers(), torch.randn(4, 32)
    values = gradients(expected, x)
    _matrix.cache_clear()
    with torch.device("meta"):
        convert_to_quartet(model, config=config)
        set_quartet_step(model, 3)
        again = gradients(model, x)
        shape = copy.deepcopy(model).to("meta")(torch.empty(5, 32)).shape
    assert shape == (5, 32)
    for a, b in zip(values, again, strict=True):
        assert torch.equal(a, b)


def test_conversion_under_inference_mode_leaves_a_trainable_model():
    model = two_layers()
    with torch.inference_mode():
        convert_to_quartet(model)
        set_quartet_step(model, 0)
        model(torch.randn(4, 32))
    set_quartet_step(model, 1)
    gradients(model, torch.randn(4, 32))


def test_warns_once_if_the_step_was_never_set(monkeypatch):
    monkeypatch.setattr(quartet_linear_module, "_warned", False)
    x = torch.randn(4, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fixed = two_layers()
        convert_to_quartet(fixed, config=QuartetConfig(randomize_backward=False))
        fixed(x)  # nothing random
        stepped = two_layers()
        convert_to_quartet(stepped)
        set_quartet_step(stepped, 0)
        stepped(x)
        model = two_layers()
        convert_to_quartet(model)
        with torch.no_grad():
            model(x)
        model.eval()(x)
    model.train()
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for _ in range(2):
            model(x)
    assert ["step was never set" in str(warning.message) for warning in record] == [True]


def test_sixteen_threads_do_not_disturb_each_other():
    x = torch.randn(8, 32)

    model = two_layers()  # all threads start from these weights

    def run(seed: int) -> list[torch.Tensor]:
        own = copy.deepcopy(model)
        convert_to_quartet(own, config=QuartetConfig(seed=seed))
        result = []
        for step in range(3):
            set_quartet_step(own, step)
            result += gradients(own, x)
        return result

    expected = [run(seed) for seed in range(16)]
    results: dict[int, list[torch.Tensor]] = {}
    threads = [threading.Thread(target=lambda s=seed: results.__setitem__(s, run(s))) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(16):
        assert all(torch.equal(a, b) for a, b in zip(expected[seed], results[seed], strict=True))
    assert not torch.equal(expected[0][0], expected[1][0])


# Bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: convert_to_quartet("model"), TypeError, "nn.Module"),
        (lambda m: convert_to_quartet(m, config=3), TypeError, "QuartetConfig"),
        (lambda m: convert_to_quartet(m, config="quart"), ValueError, "quart"),
        (lambda m: convert_to_quartet(m, modules_to_not_convert="lm_head"), TypeError, r"\['lm_head'\]"),
        (lambda m: convert_to_quartet(m, modules_to_not_convert=[""]), TypeError, "modules_to_not_convert"),
        (lambda m: convert_to_quartet(m, modules_to_not_convert=5), TypeError, "modules_to_not_convert is 5"),
        (lambda m: convert_to_quartet(m, modules_to_not_convert=["heads"]), ValueError, "'heads'"),
        (lambda m: convert_to_quartet(m, modules_to_not_convert=["*"]), ValueError, "no linear layer"),
        (lambda m: convert_to_quartet(nn.ReLU()), ValueError, "no nn.Linear"),
        (lambda m: convert_to_quartet(nn.Linear(8, 8)), ValueError, "not a multiple"),
        (lambda m: revert_from_quartet(None), TypeError, "nn.Module"),
        (lambda m: set_quartet_step(3, 3), TypeError, "nn.Module"),
        (lambda m: set_quartet_step(m, 1), ValueError, "convert_to_quartet"),
        (lambda m: set_quartet_step(m, -1), ValueError, "step is -1"),
        (lambda m: set_quartet_step(m, 2**32), ValueError, "4294967296"),
        (lambda m: set_quartet_step(m, 0, 2**16), ValueError, "micro_batch is 65536"),
        (lambda m: set_quartet_step(m, 1.5), TypeError, "1.5"),
        (lambda m: set_quartet_step(m, 0, rank=-1), ValueError, "rank is -1; it must be at least 0"),
        (lambda m: QuartetLinear(33, 32), ValueError, "33"),
        (lambda m: QuartetLinear(32, 40), ValueError, "40"),
    ],
)
def test_bad_input_is_one_clear_sentence_and_changes_nothing(call, error, words):
    model = two_layers()
    with pytest.raises(error, match=words) as caught:
        call(model)
    assert "\n" not in str(caught.value)
    assert all(type(m) in (nn.Linear, nn.ReLU, nn.Sequential) for m in model.modules())


def test_an_error_in_the_filter_changes_nothing():
    model = two_layers()

    def fails_on_the_second(layer: nn.Module, name: str) -> bool:
        if name == "2":
            raise KeyError(name)
        return True

    with pytest.raises(KeyError):
        convert_to_quartet(model, module_filter_fn=fails_on_the_second)
    assert type(model[0]) is nn.Linear


def test_quartet_linear_can_be_made_directly():
    layer = QuartetLinear(32, 64, bias=False, config=QuartetConfig(seed=3))
    assert layer(torch.randn(2, 3, 32)).shape == (2, 3, 64)
    assert "seed=3" in repr(layer)


def test_the_report_names_layers_that_keep_what_they_were():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    convert_to_quartet(model)
    assert convert_to_quartet(model).unchanged == {}
    report = convert_to_quartet(model, config="bf16_backward", modules_to_not_convert=["1"])
    assert report.unchanged == {"0": "keeps QuartetConfig()", "1": "matches '1'"}
    assert "converted before 1: matches '1'" in str(report)


def test_processes_that_share_a_batch_can_share_random_bits():
    layer = QuartetLinear(32, 32)
    set_quartet_step(layer, 3, 5, rank=2)
    assert layer._quartet_seed.tolist() == [0, 3, (2 << 16) + 5]
