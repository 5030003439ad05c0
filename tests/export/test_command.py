"""``lightning-quartet export`` on checkpoints that Trainers write."""

import signal
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from models import llama, tokenizer, tokens
from safetensors.torch import save_file
from test_files import Bomb
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_quartet import QuartetConfig, QuartetLinear, QuartetQAT
from lightning_quartet.cli import main
from lightning_quartet.export import from_pretrained_quartet


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
    path: Path, callback: QuartetQAT, weights_only: bool = False, average: bool = False
) -> tuple[Path, Tensor, nn.Module]:
    """A checkpoint, and the logits of the trained model."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(accelerator="cpu", max_steps=2, callbacks=[callback], **quiet)
    module = Module(average)
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
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("lightning_quartet.export.api.write_card", lambda *args: signal.raise_signal(number))
    try:
        result = export(ckpt, source, tmp_path / "out")
    except SystemExit as stop:
        result = stop.code
    assert result == status
    assert capsys.readouterr().err.count("\n") == (number == signal.SIGINT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt", "source"]
    assert signal.getsignal(signal.SIGTERM) is before


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
