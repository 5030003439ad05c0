"""Each format's round trip: written by us, read and run by the package that it is for."""

import copy
import json
from pathlib import Path

import pytest
import torch
from models import ONE_LAYER, bert, llama, tokenizer, tokens
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, MixtralConfig, MixtralForCausalLM

from lightning_quartet import QuartetConfig, QuartetLinear, convert_to_quartet, pack_quartet, revert_from_quartet
from lightning_quartet.export import FORMATS, export_quartet, from_pretrained_quartet
from lightning_quartet.export.gguf import _LLAMA_3
from quartet_kernels.reference import rotate, round_nearest
from quartet_kernels.rotation import rotation_matrix

FP_QUANT = QuartetConfig.from_recipe("fp_quant")
IDENTITY = QuartetConfig(transform_init="identity")


def read(folder: Path) -> tuple[dict[str, Tensor], dict]:
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def quartet_layers(model: nn.Module) -> dict[str, QuartetLinear]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, QuartetLinear)}


def weights_only(model: nn.Module) -> nn.Module:
    """The model with its quantised weights and plain products."""
    reference = copy.deepcopy(model)
    pack_quartet(reference)
    revert_from_quartet(reference)
    return reference


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    return model(tokens())[0]


def error(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# dense ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [QuartetConfig(), QuartetConfig(forward_method="abs_max"), IDENTITY], ids=str)
@pytest.mark.parametrize("make", [llama, bert])
def test_dense_has_the_logits_of_the_quantised_weights(tmp_path, make, config):
    model = make(config)
    export_quartet(model, "dense", tmp_path / "a", dtype=torch.float32)
    loaded = type(model).from_pretrained(tmp_path / "a")
    assert torch.equal(outputs(loaded), outputs(weights_only(model)))
    assert 0.01 < error(outputs(loaded), outputs(make())) < 1  # it is not the unquantised model

    export_quartet(model, "dense", tmp_path / "b")
    loaded = type(model).from_pretrained(tmp_path / "b", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert error(outputs(loaded).float(), outputs(weights_only(model))) < 0.03


# fp_quant ------------------------------------------------------------------------------------------------------------


def test_fp_quant_tensor_names_shapes_and_bytes(tmp_path):
    model = llama(FP_QUANT, bias=True)
    export_quartet(model, "fp_quant", tmp_path / "a")
    tensors, config = read(tmp_path / "a")
    assert config["dtype"] == "bfloat16"
    assert config["quantization_config"] == {
        "quant_method": "fp_quant",
        "forward_dtype": "mxfp4",
        "forward_method": "quest",
        "backward_dtype": "bf16",
        "hadamard_group_size": 32,
        "store_master_weights": False,
        "pseudoquantization": False,
        "transform_init": "hadamard",
        "modules_to_not_convert": ["lm_head"],
    }
    assert tensors["lm_head.weight"].dtype == torch.bfloat16
    for name, layer in quartet_layers(model).items():
        part = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
        rows, columns = layer.weight.shape
        assert {key: (t.dtype, tuple(t.shape)) for key, t in part.items() if key != "bias"} == {
            "qweight": (torch.uint8, (rows, columns // 2)),
            "scales": (torch.uint8, (rows, columns // 32)),
            "weight_global_scale": (torch.bfloat16, (1,)),
            "act_global_scale": (torch.bfloat16, (1,)),
            "forward_hadamard_matrix": (torch.bfloat16, (32, 32)),
        }
        packed = layer.quantized_weight()
        assert torch.equal(part["qweight"], packed.codes)
        assert torch.equal(part["scales"], packed.scales)
        assert part["weight_global_scale"].item() == part["act_global_scale"].item() == 1.0
        assert ("bias" in part) == (layer.bias is not None)


@pytest.fixture
def fp_quant_kernel(monkeypatch):
    """fp-quant's own Triton kernel, interpreted, with one tile size (the interpreter cannot be timed)."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    mxfp4 = pytest.importorskip("fp_quant.module.triton.mxfp4")
    monkeypatch.setattr(mxfp4.mxfp4_forward_kernel, "configs", mxfp4.mxfp4_forward_kernel.configs[:1])
    return mxfp4.mxfp4_forward_kernel_wrapper


@pytest.mark.parametrize("transform_init", ["hadamard", "gsr", "identity"])
def test_fp_quant_forward_is_that_of_its_own_kernel(tmp_path, fp_quant_kernel, transform_init):
    config = QuartetConfig.from_recipe("fp_quant", transform_init=transform_init)
    model = llama(config, bias=True)
    export_quartet(model, "fp_quant", tmp_path / "a", dtype=torch.float32)
    tensors, _ = read(tmp_path / "a")
    name = "model.layers.0.self_attn.o_proj"
    x = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    matrix = tensors[f"{name}.forward_hadamard_matrix"]
    # fp-quant stores what its kernel makes of the master weight: the bytes must say the same.
    values = decoded(tensors[f"{name}.qweight"], tensors[f"{name}.scales"])
    weight, _ = fp_quant_kernel(
        quartet_layers(model)[name].weight.detach(), matrix, gaussian_scale=2.92247856 / 6.0, quest=True
    )
    assert torch.equal(weight, values)
    inputs, _ = fp_quant_kernel(x, matrix, gaussian_scale=2.92247856 / 6.0, quest=True)
    alpha = 1 / (tensors[f"{name}.weight_global_scale"] * tensors[f"{name}.act_global_scale"])
    expected = inputs @ values.t() * alpha + tensors[f"{name}.bias"]
    assert error(quartet_layers(model)[name](x), expected) < 1e-6


def test_fp_quant_abs_max_has_their_scales(tmp_path, fp_quant_kernel):
    model = llama(QuartetConfig(forward_method="abs_max"))
    export_quartet(model, "fp_quant", tmp_path / "a", dtype=torch.float32)
    tensors, config = read(tmp_path / "a")
    assert config["quantization_config"]["forward_method"] == "abs_max"
    name = "model.layers.1.mlp.down_proj"
    matrix = tensors[f"{name}.forward_hadamard_matrix"]
    weight, _ = fp_quant_kernel(quartet_layers(model)[name].weight.detach(), matrix, quest=False)
    values = decoded(tensors[f"{name}.qweight"], tensors[f"{name}.scales"]) / tensors[f"{name}.weight_global_scale"]
    torch.testing.assert_close(values, weight, rtol=1e-6, atol=0)


def decoded(codes: Tensor, scales: Tensor) -> Tensor:
    """MXFP4 bytes as floats, written out from the format's definition."""
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(-2).int()
    values = grid[nibbles & 7] * (1 - 2 * (nibbles >> 3))
    return (values.unflatten(-1, (-1, 32)) * torch.exp2(scales.float() - 127)[..., None]).flatten(-2)


# compressed-tensors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [QuartetConfig(), QuartetConfig(hadamard_group_size=64), IDENTITY], ids=str)
@pytest.mark.parametrize("make", [llama, bert])
def test_compressed_tensors_decompresses_and_transforms_to_ours(tmp_path, make, config):
    transform = pytest.importorskip("compressed_tensors.transform")
    from transformers import CompressedTensorsConfig

    model = make(config)
    export_quartet(model, "compressed-tensors", tmp_path / "a", dtype=torch.float32)
    loaded = type(model).from_pretrained(
        tmp_path / "a", dtype=torch.float32, quantization_config=CompressedTensorsConfig(dequantize=True)
    )
    tensors, saved = read(tmp_path / "a")
    for name, layer in quartet_layers(model).items():
        assert torch.equal(loaded.get_submodule(name).weight, layer.quantized_weight().dequantize()), name
    quantization = saved["quantization_config"]
    if config.transform_init == "identity":
        assert "transform_config" not in quantization
    else:
        assert error(outputs(loaded), outputs(weights_only(model))) > 0.1  # the rotation is still missing
        transform.apply_transform_config(loaded, transform.TransformConfig(**quantization["transform_config"]))
        for name in quartet_layers(model):
            theirs = loaded.get_submodule(f"{name}.quartet_input").weight
            assert torch.equal(theirs.float(), tensors[f"{name}.quartet_input.weight"])
    assert error(outputs(loaded), outputs(weights_only(model))) < 2e-6


def test_compressed_tensors_activations(tmp_path):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    for activations in (None, "abs_max"):
        folder = tmp_path / str(activations)
        export_quartet(llama(QuartetConfig()), "compressed-tensors", folder, activations=activations)
        config = read(folder)[1]["quantization_config"]
        valid = quantization.QuantizationConfig.model_validate(config)
        inputs = valid.config_groups["group_0"].input_activations
        assert (inputs is None) == (activations is None)
        if inputs is not None:
            assert inputs.dynamic is True
            assert (inputs.num_bits, inputs.group_size) == (4, 32)


# auto-round ----------------------------------------------------------------------------------------------------------


def abs_max_rceil(x: Tensor) -> Tensor:
    """MXFP4 by the absolute maximum, its scale rounded up: what auto-round calls mx_fp_rceil."""
    groups = x.unflatten(-1, (-1, 32))
    scale = torch.exp2((groups.abs().amax(-1, keepdim=True) / 6).log2().ceil())
    return (round_nearest(groups / scale) * scale).flatten(-2)


def abs_max_floor(x: Tensor) -> Tensor:
    """The same with the scale of the OCP specification, rounded down: what torchao does by default."""
    groups = x.float().unflatten(-1, (-1, 32))
    scale = torch.exp2(groups.abs().amax(-1, keepdim=True).log2().floor() - 2)
    return (round_nearest(groups / scale) * scale).flatten(-2).to(x.dtype)


@pytest.mark.parametrize(("make", "config"), [(llama, QuartetConfig()), (llama, IDENTITY), (bert, IDENTITY)])
def test_auto_round_runs_in_stock_transformers(tmp_path, make, config):
    pytest.importorskip("auto_round")
    model = make(config)
    export_quartet(model, "auto-round", tmp_path / "a", dtype=torch.float32)
    loaded = type(model).from_pretrained(tmp_path / "a", dtype=torch.float32)

    matrix = rotation_matrix(config.transform_init, 32, torch.device("cpu"))
    reference = weights_only(model)
    for name, layer in quartet_layers(model).items():
        plain = reference.get_submodule(name)
        plain.weight.data = layer.quantized_weight().dequantize()
        plain.register_forward_pre_hook(lambda _, args: (abs_max_rceil(rotate(args[0], matrix)),))
    assert error(outputs(loaded), outputs(reference)) < 1e-5
    assert error(outputs(loaded), outputs(weights_only(model))) > 0.01


def test_auto_round_refuses_layers_that_it_would_rotate_or_not_otherwise_than_the_training(tmp_path):
    with pytest.raises(ValueError, match="but lm_head, and so those of pooler.dense otherwise"):
        export_quartet(bert(QuartetConfig()), "auto-round", tmp_path / "a")
    model = llama()
    convert_to_quartet(model, modules_to_not_convert=[])
    with pytest.raises(ValueError, match="and so those of lm_head otherwise"):
        export_quartet(model, "auto-round", tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_auto_round_refuses_output_layers_in_mxfp4_that_it_would_fill_with_random_numbers(tmp_path):
    for make in (
        lambda: llama(),
        lambda: BertForMaskedLM(BertConfig(**ONE_LAYER, num_attention_heads=2, tie_word_embeddings=False)),
    ):
        model = make()
        convert_to_quartet(model, config=IDENTITY, modules_to_not_convert=[])
        with pytest.raises(ValueError, match="never puts .* in MXFP4, an output layer or the last one"):
            export_quartet(model, "auto-round", tmp_path / "a")


def test_auto_round_refuses_fused_experts_and_other_cards_name_them(tmp_path):
    model = MixtralForCausalLM(
        MixtralConfig(**ONE_LAYER, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    ).eval()
    convert_to_quartet(model, config=IDENTITY)
    with pytest.raises(ValueError, match=r"cannot keep the fused experts model.layers.0.mlp.experts"):
        export_quartet(model, "auto-round", tmp_path / "a")
    assert "`model.layers.0.mlp.experts.gate_up_proj`" in card(export_quartet(model, "dense", tmp_path / "b"))


def card(folder: Path) -> str:
    return (folder / "README.md").read_text()


def test_cards_contradict_neither_themselves_nor_the_model(tmp_path):
    text = card(export_quartet(llama(QuartetConfig()), "fp_quant", tmp_path / "a"))
    assert "by QuEST with `std` and `floor`, otherwise than in training" in text
    assert "quantised as in training" not in text
    assert "quantised as in training" in card(export_quartet(llama(FP_QUANT), "fp_quant", tmp_path / "b"))
    assert "inputs were rotated and quantised" in card(export_quartet(llama(QuartetConfig()), "dense", tmp_path / "c"))
    assert "inputs were quantised" in card(export_quartet(llama(IDENTITY), "dense", tmp_path / "d"))


# gguf, torchao -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_gguf_is_read_by_the_gguf_package_and_by_transformers(tmp_path, tied, bias):
    check_gguf(tmp_path, llama(IDENTITY, tied=tied, bias=bias), tied, bias)


def check_gguf(tmp_path: Path, model: nn.Module, tied: bool, bias: bool = False) -> None:
    gguf = pytest.importorskip("gguf")
    export_quartet(model, "gguf", tmp_path / "a", dtype=torch.float32)
    reader = gguf.GGUFReader(tmp_path / "a" / "model.gguf")
    tensors = {t.name: t for t in reader.tensors}
    assert {t.tensor_type.name for name, t in tensors.items() if "ffn_down" in name} == {"MXFP4"}
    layer = quartet_layers(model)["model.layers.1.mlp.down_proj"]
    values = gguf.quants.dequantize(tensors["blk.1.ffn_down.weight"].data, gguf.GGMLQuantizationType.MXFP4)
    assert torch.equal(torch.from_numpy(values), layer.dequantized_weight())
    assert ("output.weight" in tensors) != tied
    assert ("transformers' GGUF reader drops" in card(tmp_path / "a")) == bias

    loaded = type(model).from_pretrained(tmp_path / "a", gguf_file="model.gguf", dtype=torch.float32)
    expected = weights_only(model)
    for name, tensor in expected.state_dict().items():
        if not bias or "bias" not in name:  # transformers' reader takes biases of attention for absent
            assert torch.equal(loaded.state_dict()[name], tensor), name
    if not bias:
        assert torch.equal(outputs(loaded), outputs(expected))


@pytest.mark.parametrize(
    ("steps", "split"),
    [
        ([pre_tokenizers.ByteLevel(add_prefix_space=False)], "gpt-2"),
        ([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)], "smollm"),
        ([pre_tokenizers.Split(Regex(_LLAMA_3), "isolated"), pre_tokenizers.ByteLevel(use_regex=False)], "llama-bpe"),
        ([pre_tokenizers.Split(Regex(r"\s+"), "isolated"), pre_tokenizers.ByteLevel(use_regex=False)], None),
        ([pre_tokenizers.Whitespace()], None),
    ],
)
def test_gguf_says_how_its_tokenizer_splits_or_has_none(tmp_path, steps, split):
    gguf = pytest.importorskip("gguf")
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    backend.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    (tmp_path / "source").mkdir()
    backend.save(str(tmp_path / "source" / "tokenizer.json"))
    model = llama(IDENTITY)
    model.config.eos_token_id = [2, 7]
    export_quartet(model, "gguf", tmp_path / "a", source=tmp_path / "source")
    fields = gguf.GGUFReader(tmp_path / "a" / "model.gguf").fields
    if split is None:
        assert not [name for name in fields if name.startswith("tokenizer")]
    else:
        assert fields["tokenizer.ggml.pre"].contents() == split
        assert fields["tokenizer.ggml.eos_token_id"].contents() == 2


@pytest.mark.parametrize("make", [llama, bert])
def test_torchao_loads_the_same_weights(tmp_path, make):
    pytest.importorskip("torchao")
    model = make(IDENTITY)
    export_quartet(model, "torchao", tmp_path / "a")
    loaded = type(model).from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    for name, layer in quartet_layers(model).items():
        weight = loaded.get_submodule(name).weight
        assert type(weight).__name__ == "MXTensor"
        assert torch.equal(weight.dequantize(torch.float32), layer.dequantized_weight()), name
    assert outputs(loaded).isfinite().all()
    for name, layer in quartet_layers(model).items():
        x = torch.randn(8, layer.in_features, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(1))
        weight, bias = layer.dequantized_weight(torch.bfloat16), layer.bias
        bias = None if bias is None else bias.to(torch.bfloat16)
        expected = nn.functional.linear(abs_max_floor(x), weight, bias)
        assert error(loaded.get_submodule(name)(x).float(), expected.float()) < 2**-8, name


# Back to us ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [QuartetConfig(), FP_QUANT, QuartetConfig(forward_method="abs_max")], ids=str)
@pytest.mark.parametrize("format", ["quartet", "fp_quant"])
@pytest.mark.parametrize("make", [llama, bert])
def test_from_pretrained_quartet_is_equal_bit_for_bit(tmp_path, make, format, config):
    model = make(config)
    export_quartet(model, format, tmp_path / "a", dtype=torch.float32, shard_bytes=50_000)
    assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 1
    loaded = from_pretrained_quartet(tmp_path / "a")
    assert not loaded.training
    assert torch.equal(outputs(loaded), outputs(model))
    pack_quartet(model)
    assert_states_equal(loaded, model)
    for name, layer in quartet_layers(loaded).items():
        assert layer.quartet_config == quartet_layers(model)[name].quartet_config

    export_quartet(loaded, format, tmp_path / "b", dtype=torch.float32)  # and again, from packed weights
    assert_states_equal(from_pretrained_quartet(tmp_path / "b"), model)


def assert_states_equal(a: nn.Module, b: nn.Module) -> None:
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for key, tensor in a.items():
        assert tensor.dtype == b[key].dtype
        assert torch.equal(tensor, b[key]), key


def test_tied_embeddings_stay_tied(tmp_path):
    model = llama(QuartetConfig(), tied=True)
    export_quartet(model, "quartet", tmp_path / "a")
    assert "lm_head.weight" not in read(tmp_path / "a")[0]
    loaded = from_pretrained_quartet(tmp_path / "a")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(outputs(loaded), outputs(model))


def test_an_fp_quant_folder_of_others_is_read(tmp_path):
    """Theirs has a backward matrix and no file of ours; with master weights those come back trainable."""
    model = llama(FP_QUANT)
    export_quartet(model, "fp_quant", tmp_path / "a", dtype=torch.float32)
    folder = tmp_path / "a"
    (folder / "quartet_export.json").unlink()
    tensors, config = read(folder)
    from safetensors.torch import save_file

    save_file(
        tensors | {f"{n}.backward_hadamard_matrix": torch.eye(32) for n in quartet_layers(model)},
        folder / "model.safetensors",
    )
    loaded = from_pretrained_quartet(folder)
    assert torch.equal(outputs(loaded), outputs(model))

    for name, layer in quartet_layers(model).items():
        del tensors[f"{name}.qweight"], tensors[f"{name}.scales"]
        tensors[f"{name}.weight"] = layer.weight.detach()
    save_file(tensors, folder / "model.safetensors")
    config["quantization_config"]["store_master_weights"] = True
    (folder / "config.json").write_text(json.dumps(config))
    loaded = from_pretrained_quartet(folder)
    assert torch.equal(outputs(loaded), outputs(model))
    assert all(layer.weight.requires_grad for layer in quartet_layers(loaded).values())


# What a format cannot hold -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "config", "reason"),
    [
        ("gguf", QuartetConfig(), "no online rotation"),
        ("torchao", QuartetConfig(), "no online rotation"),
        ("compressed-tensors", QuartetConfig(transform_init="gsr"), "has no rotation 'gsr'"),
        ("auto-round", QuartetConfig(transform_init="gsr"), "has no rotation 'gsr'"),
        *[
            (name, QuartetConfig(forward_method="abs_max", transform_init="identity"), "factor 4/3")
            for name in ("gguf", "torchao", "compressed-tensors", "auto-round")
        ],
    ],
)
def test_what_would_be_lost_is_refused(tmp_path, format, config, reason):
    with pytest.raises(ValueError, match=reason):
        export_quartet(llama(config), format, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_every_format_is_covered_and_has_a_card(tmp_path):
    tokenizer(tmp_path / "source")
    for name, row in FORMATS.items():
        config = QuartetConfig() if "hadamard" in row.rotations else IDENTITY
        folder = export_quartet(llama(config), name, tmp_path / name, source=tmp_path / "source")
        card = (folder / "README.md").read_text()
        assert name in card
        assert row.holds in card
        assert all(note in card for note in row.notes)
        assert "{" not in card.split("```python")[1].split("```")[0]
        compile(card.split("```python")[1].split("```")[0], "card", "exec")
        assert (folder / "generation_config.json").is_file()
        assert (folder / "tokenizer.json").is_file()
        from transformers import AutoTokenizer

        assert AutoTokenizer.from_pretrained(folder)("w5 w7")["input_ids"] == [5, 7]
