"""``lightning-quartet export`` on checkpoints that Trainers write."""

import json
import signal
from pathlib import Path

import lightning.pytorch as pl
import peft
import pytest
import torch
from models import ONE_LAYER, bert, llama, tokenizer, tokens
from safetensors.torch import load_file, save_file
from test_files import Bomb
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForMaskedLM

from lightning_quartet import QuartetConfig, QuartetLinear, QuartetPrecision, QuartetQAT, convert_to_quartet
from lightning_quartet.cli import main
from lightning_quartet.export import export_quartet, from_pretrained_quartet
from lightning_quartet.recipes import TextClassifier


class Module(pl.LightningModule):
    """A language model two attributes deep, and an average of it."""

    def __init__(self, average: bool = False) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"lm": llama()})
        if average:
            self.average = llama()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net["lm"](input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-2)


def train(
    path: Path,
    callback: QuartetQAT | None,
    weights_only: bool = False,
    average: bool = False,
    module: pl.LightningModule | None = None,
    **options,
) -> tuple[Path, Tensor, nn.Module]:
    """A checkpoint, and the logits of the trained model."""
    callbacks = [] if callback is None else [callback]
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(accelerator="cpu", max_steps=2, callbacks=callbacks, **quiet, **options)
    module = module or Module(average)
    trainer.fit(module, DataLoader(tokens(4), batch_size=2))
    trainer.save_checkpoint(path, weights_only=weights_only)
    model = module.net["lm"].eval()
    with torch.no_grad():
        return path, model(tokens()).logits, model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    llama().config.save_pretrained(folder)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("{", '{"architectures": ["LlamaForCausalLM"],', 1))
    tokenizer(folder)
    return folder


def export(ckpt: Path, source: Path, out: Path, *more: str, format: str = "quartet") -> int:
    return main(["export", "--ckpt", f"{ckpt}", "--model", f"{source}", "--format", format, "--out", f"{out}", *more])


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return from_pretrained_quartet(folder)(tokens()).logits


@pytest.mark.parametrize(
    "config", [QuartetConfig(statistic="std", transform_init="gsr"), QuartetConfig(store_master_weights=False)], ids=str
)
def test_a_checkpoint_becomes_the_model_that_was_trained(tmp_path, source, config, capsys):
    ckpt, expected, trained = train(tmp_path / "a.ckpt", QuartetQAT(config))
    assert export(ckpt, source, tmp_path / "out", "--dtype", "float32") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    assert torch.equal(logits(tmp_path / "out"), expected)
    assert (tmp_path / "out" / "tokenizer.json").is_file()

    assert export(ckpt, source, tmp_path / "dense", "--dtype", "float32", format="dense") == 0
    dense = type(trained).from_pretrained(tmp_path / "dense")
    layer = trained.model.layers[0].mlp.up_proj
    assert torch.equal(dense.model.layers[0].mlp.up_proj.weight, layer.dequantized_weight())


@pytest.mark.parametrize("packed", [False, True])
def test_tensors_keep_the_dtypes_of_the_training(tmp_path, source, packed):
    callback = QuartetQAT(QuartetConfig(store_master_weights=not packed))
    ckpt, _, trained = train(tmp_path / "a.ckpt", callback, precision="bf16-true")
    assert export(ckpt, source, tmp_path / "out") == 0
    export_quartet(trained, "quartet", tmp_path / "b", source=source)
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "b"))
    assert {tensor.dtype for tensor in found.values()} == {torch.uint8, torch.bfloat16}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in found)


def test_what_a_training_tied_to_an_embedding_stays_as_it_was_trained(tmp_path, source):
    lm = BertForMaskedLM(BertConfig(**ONE_LAYER, num_attention_heads=2, tie_word_embeddings=False)).eval()
    lm.save_pretrained(source)
    lm.cls.predictions.decoder.weight = lm.bert.embeddings.word_embeddings.weight
    module = Module()
    module.net["lm"] = lm
    ckpt, expected, _ = train(tmp_path / "a.ckpt", QuartetQAT(), module=module)
    assert type(lm.cls.predictions.decoder) is nn.Linear
    assert export(ckpt, source, tmp_path / "out") == 0
    assert torch.equal(logits(tmp_path / "out"), expected)


def test_packed_codes_of_another_recipe_are_refused(tmp_path, source, capsys):
    config = QuartetConfig(store_master_weights=False, hadamard_group_size=64)
    ckpt, *_ = train(tmp_path / "a.ckpt", QuartetQAT(config), weights_only=True)
    assert export(ckpt, source, tmp_path / "out", "--recipe", "quartet") == 1
    assert "codes of 'quest hadamard 64' and the layer computes with 'quest hadamard 32'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_layers_left_alone_in_the_training_are_left_alone(tmp_path, source):
    patterns = ["net.lm.lm_head", "lm.model.layers.0.mlp"]  # names as the training saw them
    ckpt, expected, _ = train(tmp_path / "a.ckpt", QuartetQAT(modules_to_not_convert=patterns))
    assert export(ckpt, source, tmp_path / "out") == 0
    loaded = from_pretrained_quartet(tmp_path / "out")
    kept = {name for name, m in loaded.named_modules() if isinstance(m, nn.Linear) and not isinstance(m, QuartetLinear)}
    assert kept == {"lm_head", *(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down"))}
    assert torch.equal(logits(tmp_path / "out"), expected)


def test_weights_only_needs_a_recipe(tmp_path, source, capsys):
    callback = QuartetQAT("fp_quant")
    ckpt, expected, trained = train(tmp_path / "a.ckpt", callback, weights_only=True)
    assert export(ckpt, source, tmp_path / "out") == 1
    assert "pass --recipe" in capsys.readouterr().err
    assert export(ckpt, source, tmp_path / "out", "--recipe", "fp_quant") == 0
    assert torch.equal(logits(tmp_path / "out"), expected)

    save_file({f"x.{k}": v for k, v in trained.state_dict().items()}, tmp_path / "a.safetensors")
    assert export(tmp_path / "a.safetensors", source, tmp_path / "b", "--recipe", "fp_quant") == 0
    assert torch.equal(logits(tmp_path / "b"), expected)

    ckpt, *_ = train(tmp_path / "full.ckpt", callback)
    assert export(ckpt, source, tmp_path / "c", "--recipe", "quartet") == 1
    assert "leave out --recipe" in capsys.readouterr().err


def test_a_prefix_is_asked_for_where_there_are_two(tmp_path, source, capsys):
    ckpt, expected, _ = train(tmp_path / "a.ckpt", QuartetQAT(), average=True)
    assert export(ckpt, source, tmp_path / "out") == 1
    assert "several: 'average.', 'net.lm.'; pass --prefix" in capsys.readouterr().err
    assert export(ckpt, source, tmp_path / "out", "--prefix", "net.lm.") == 0
    assert torch.equal(logits(tmp_path / "out"), expected)
    assert export(ckpt, source, tmp_path / "other", "--prefix", "nothing.") == 1
    assert "it lacks model.embed_tokens.weight" in capsys.readouterr().err


def test_refusals_are_one_sentence_and_leave_nothing(tmp_path, source, capsys):
    ckpt, *_ = train(tmp_path / "a.ckpt", QuartetQAT())
    data = ckpt.read_bytes()
    (tmp_path / "half.ckpt").write_bytes(data[: len(data) // 2])
    torch.save({"state_dict": {"a": Bomb(tmp_path / "exploded")}}, tmp_path / "bomb.ckpt")
    torch.save([1], tmp_path / "list.ckpt")
    (tmp_path / "bad.safetensors").write_bytes(b"12345678901234567890")
    (tmp_path / "shards").mkdir()
    small = tmp_path / "small"
    small.mkdir()
    (small / "config.json").write_text(
        (source / "config.json").read_text().replace('"hidden_size": 64', '"hidden_size": 32')
    )
    before = sorted(path.name for path in tmp_path.iterdir())
    for path, model, options, message in (
        ("half.ckpt", source, (), "half.ckpt is damaged or holds Python objects"),
        ("bomb.ckpt", source, (), "could run code"),
        ("list.ckpt", source, (), "no state_dict"),
        ("bad.safetensors", source, ("--recipe", "quartet"), "bad.safetensors is truncated or no safetensors file"),
        ("missing.ckpt", source, (), "is no file"),
        ("shards", source, (), "consolidate"),
        ("a.ckpt", small, (), "does not fit"),
        ("a.ckpt", tmp_path, (), "has no config.json"),
        ("a.ckpt", source, ("--format", "gguf"), "no online rotation"),
    ):
        assert export(tmp_path / path, model, tmp_path / "out", *options) == 1
        err = capsys.readouterr().err
        assert message in err
        assert err.startswith("lightning-quartet export: ")
        assert err.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_it_without_a_trace(tmp_path, source, capsys, monkeypatch, number, status):
    ckpt, *_ = train(tmp_path / "a.ckpt", QuartetQAT())

    def unhandled(*args):
        raise AssertionError

    original = signal.signal(signal.SIGTERM, unhandled)
    monkeypatch.setattr("lightning_quartet.export.api.write_card", lambda *args: signal.raise_signal(number))
    try:
        result = export(ckpt, source, tmp_path / "out")
    except SystemExit as stop:
        result = stop.code
    except KeyboardInterrupt:
        result = None
    assert signal.signal(signal.SIGTERM, original) is unhandled
    assert result == status
    assert capsys.readouterr().err.count("\n") == (number == signal.SIGINT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt", "source"]


def changed(ckpt: Path, **tensors: Tensor) -> Path:
    """A checkpoint with these tensors in the state dict."""
    content = torch.load(ckpt, weights_only=True)
    content["state_dict"] |= tensors
    torch.save(content, ckpt.parent / "changed.ckpt")
    return ckpt.parent / "changed.ckpt"


def test_tensors_that_would_be_cast_or_are_not_finite_are_refused(tmp_path, source, capsys):
    ckpt, expected, trained = train(tmp_path / "a.ckpt", QuartetQAT())
    weight, norm = trained.model.layers[0].mlp.up_proj.weight.detach(), trained.model.norm.weight.detach()
    for dtype in (torch.int8, torch.bool, torch.complex64):
        bad = changed(ckpt, **{"net.lm.model.layers.0.mlp.up_proj.weight": weight.to(dtype)})
        assert export(bad, source, tmp_path / "out") == 1
        assert f"up_proj.weight of {bad} is {dtype}; it must be" in capsys.readouterr().err
    bad = changed(ckpt, **{"net.lm.model.norm.weight": norm * torch.nan})
    assert export(bad, source, tmp_path / "out") == 1
    assert "model.norm.weight holds NaN" in capsys.readouterr().err
    content = torch.load(ckpt, weights_only=True)
    content["state_dict"][1] = torch.ones(1)
    torch.save(content, ckpt)
    assert export(ckpt, source, tmp_path / "out", "--dtype", "float32") == 0
    assert torch.equal(logits(tmp_path / "out"), expected)


class WithHead(Module):
    """A layer of its own beside the language model, which a pattern names."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 32)


def test_layers_beside_the_model_are_left_out_with_a_word(tmp_path, source, capsys):
    callback = QuartetQAT(modules_to_not_convert=["lm_head", "head"])
    ckpt, expected, _ = train(tmp_path / "a.ckpt", callback, module=WithHead())
    for i, more in enumerate(((), ("--prefix", "net.lm."), ("--prefix", "net.lm"))):
        assert export(ckpt, source, tmp_path / f"{i}", *more) == 0
        assert "left out 2 tensors outside 'net.lm.': head." in capsys.readouterr().err
        assert torch.equal(logits(tmp_path / f"{i}"), expected)


def test_compiled_blocks_lose_the_components_of_their_names(tmp_path, source):
    module = Module()
    layers = module.net["lm"].model.layers
    layers[1] = torch.compile(layers[1], backend="eager")
    ckpt, expected, _ = train(tmp_path / "a.ckpt", QuartetQAT(), module=module)
    assert export(ckpt, source, tmp_path / "out") == 0
    assert torch.equal(logits(tmp_path / "out"), expected)


def test_a_classifier_needs_the_folder_of_the_class_that_was_trained(tmp_path, capsys):
    base, out = tmp_path / "base", tmp_path / "out"
    bert().save_pretrained(base)
    classifier = TextClassifier(str(base), 3)
    rows = [{"input_ids": row, "labels": torch.tensor(i % 3)} for i, row in enumerate(tokens(4))]
    quiet = {"logger": False, "enable_checkpointing": False}
    trainer = pl.Trainer(accelerator="cpu", max_steps=1, callbacks=[QuartetQAT()], **quiet)
    trainer.fit(classifier, DataLoader(rows, batch_size=2))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert export(tmp_path / "a.ckpt", base, out) == 1
    err = capsys.readouterr().err
    assert "has model.classifier.weight, a head that BertModel does not have" in err
    assert "--prefix model.bert." in err
    assert export(tmp_path / "a.ckpt", base, tmp_path / "b", "--prefix", "model.bert.") == 0
    assert "left out 2 tensors" in capsys.readouterr().err
    classifier.model.save_pretrained(tmp_path / "whole")
    assert export(tmp_path / "a.ckpt", tmp_path / "whole", out) == 0
    loaded = from_pretrained_quartet(out)
    assert type(loaded).__name__ == "BertForSequenceClassification"
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, classifier.eval()({"input_ids": tokens()}))


def test_lora_is_named(tmp_path, source, capsys):
    module = Module()
    module.net["lm"] = peft.get_peft_model(module.net["lm"], peft.LoraConfig(target_modules="all-linear"))
    ckpt, *_ = train(tmp_path / "a.ckpt", QuartetQAT(), module=module)
    assert export(ckpt, source, tmp_path / "out") == 1
    assert "has LoRA or other adapters (net.lm.base_model" in capsys.readouterr().err


@pytest.mark.parametrize("phase", [{"end_step": 1}, {"start_step": 2}, {"end_step": 2}, {"start_step": 1}])
def test_a_training_that_ended_in_high_precision_is_refused(tmp_path, source, capsys, phase):
    ckpt, *_ = train(tmp_path / "a.ckpt", QuartetQAT(**phase))
    off = phase in ({"end_step": 1}, {"start_step": 2})
    assert export(ckpt, source, tmp_path / "out") == off
    assert ("ends with step 1, which trained in high precision" in capsys.readouterr().err) == off
    content = torch.load(ckpt, weights_only=True)
    for state in content["callbacks"].values():
        for name in ("start_step", "end_step", "converted_before"):  # older checkpoints have none
            state.pop(name, None)
    torch.save(content, tmp_path / "old.ckpt")
    assert export(tmp_path / "old.ckpt", source, tmp_path / "old") == 0


def test_layers_converted_before_keep_their_numerics(tmp_path, source, capsys):
    module, other = Module(), QuartetConfig(transform_init="identity")
    convert_to_quartet(module, config=other)
    ckpt, expected, _ = train(tmp_path / "a.ckpt", QuartetQAT(), module=module)
    assert export(ckpt, source, tmp_path / "out") == 0
    assert torch.equal(logits(tmp_path / "out"), expected)
    mixed = Module()
    convert_to_quartet(mixed, config=other, modules_to_not_convert=["lm_head", "mlp"])
    ckpt, *_ = train(tmp_path / "b.ckpt", QuartetQAT(), module=mixed)
    assert export(ckpt, source, tmp_path / "b") == 1
    assert "2 different configs" in capsys.readouterr().err


def test_the_precision_plugin_says_how_it_trained(tmp_path, source):
    plugin = QuartetPrecision("32-true", QuartetConfig(statistic="std"), ["lm_head", "layers.0"])
    ckpt, expected, _ = train(tmp_path / "a.ckpt", None, plugins=[plugin])
    assert export(ckpt, source, tmp_path / "out", "--dtype", "float32") == 0
    assert torch.equal(logits(tmp_path / "out"), expected)


def test_the_generation_config_is_carried_over(tmp_path, source):
    values = {"eos_token_id": [2, 7, 9], "do_sample": True, "temperature": 0.6, "max_new_tokens": 5}
    (source / "generation_config.json").write_text(json.dumps(values))
    ckpt, *_ = train(tmp_path / "a.ckpt", QuartetQAT())
    assert export(ckpt, source, tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()).items() >= values.items()
    assert from_pretrained_quartet(tmp_path / "out").generation_config.eos_token_id == [2, 7, 9]
    (tmp_path / "out" / "generation_config.json").write_text('{"compile_config": 3}')
    with pytest.raises(ValueError, match=r"generation_config.json is no valid generation config"):
        from_pretrained_quartet(tmp_path / "out")


def test_help_starts_without_building_the_training_command(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["export", "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "compressed-tensors" in out
    assert "--overwrite" in out
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "export" in capsys.readouterr().out
