"""The YAML files of `examples/`: each runs a few steps on a cut model, from the command line's own entry point."""

import lzma
import runpy
import sys
from pathlib import Path

import pytest
import small_examples
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_quartet.__main__ import main
from lightning_quartet.recipes import CausalLM, TextDataModule

ROOT = Path(__file__).parents[2]
LANGUAGE_MODEL = ROOT / "examples" / "language_model"


@pytest.fixture
def short_corpus(tmp_path: Path) -> Path:
    return small_examples.short_corpus(tmp_path)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-quartet", *arguments])
    main()


def cut(folder: Path, corpus: Path, steps: int = 4) -> list[str]:
    return [
        f"--trainer.max_steps={steps}",
        "--trainer.val_check_interval=2",
        "--trainer.limit_val_batches=2",
        "--trainer.log_every_n_steps=1",
        "--trainer.accelerator=cpu",
        "--trainer.precision=32-true",
        f"--trainer.logger.init_args.save_dir={folder / 'runs'}",
        "--model.init_args.compile_layers=false",
        "--data.init_args.batch_size=4",
        *small_examples.sizes(folder, corpus),
    ]


@pytest.mark.parametrize("name", ["config", "config_float32", "config_gpu"])
def test_language_model_runs(
    name: str, tmp_path: Path, short_corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, "fit", "--config", str(LANGUAGE_MODEL / f"{name}.yaml"), *cut(tmp_path, short_corpus))
    (folder,) = (tmp_path / "runs").glob("*/version_0")
    assert (folder / "loss_curve.png").stat().st_size > 1000
    assert (folder / "sample.txt").read_text().startswith("My fellow Americans,")
    assert list(folder.glob("events.out.tfevents.*"))
    shown = capsys.readouterr()
    for metric in ("train_loss", "val_loss", "tokens/s"):
        assert metric in shown.out + shown.err

    (checkpoint,) = (folder / "checkpoints").glob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert "model.model.layers.0.mlp.gate_proj.weight" in state
    assert all(value.is_floating_point() for value in state.values())
    run(
        monkeypatch,
        "fit",
        "--config",
        str(LANGUAGE_MODEL / f"{name}.yaml"),
        *cut(tmp_path, short_corpus, steps=6),
        f"--ckpt_path={checkpoint}",
    )


@pytest.mark.parametrize("name", ["config", "lora"])
def test_finetune_llm_runs(name: str, tmp_path: Path, short_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = TextDataModule(str(short_corpus), vocabulary_size=512, sequence_length=32, batch_size=4)
    data.prepare_data()
    data.setup("fit")
    assert data.tokenizer is not None
    model = tmp_path / "model"
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=512, num_key_value_heads=1, **sizes)).save_pretrained(model)
    data.tokenizer.save(str(model / "tokenizer.json"))
    config = ROOT / "examples" / "finetune_llm" / f"{name}.yaml"
    text = ROOT / "examples" / "finetune_llm" / "austen.txt.xz"
    (tmp_path / "novel.txt").write_text(lzma.decompress(text.read_bytes()).decode()[:100_000])
    quick = [
        "--trainer.max_steps=4",
        "--trainer.val_check_interval=2",
        "--trainer.limit_val_batches=2",
        "--trainer.log_every_n_steps=1",
        "--trainer.accelerator=cpu",
        "--trainer.precision=32-true",
        f"--model.init_args.pretrained={model}",
        "--model.init_args.compile_layers=false",
        f"--data.init_args.tokenizer={model}",
        "--data.init_args.path=novel.txt",
        "--data.init_args.sequence_length=32",
        "--data.init_args.batch_size=4",
    ]
    run(monkeypatch, "fit", "--config", str(config), *quick)
    (folder,) = (tmp_path / "runs").glob("*/version_0")
    assert (folder / "loss_curve.png").stat().st_size > 1000
    assert (folder / "sample.txt").read_text().startswith("It is a truth universally acknowledged,")
    (checkpoint,) = (folder / "checkpoints").glob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert any("lora_A" in key for key in state) == any("weight_codes" in key for key in state) == (name == "lora")


def test_fabric_loop_learns(short_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(short_corpus.parent)  # the tokenizer's cache is relative to the working folder
    losses = runpy.run_path(str(ROOT / "examples" / "fabric_loop" / "train.py"))["main"](4, str(short_corpus))
    assert len(losses) == 4
    assert losses[-1] < losses[0] - 0.1


def test_the_two_language_model_runs_differ_only_in_the_callback() -> None:
    configs = {
        name: yaml.safe_load((LANGUAGE_MODEL / f"{name}.yaml").read_text()) for name in ("config", "config_float32")
    }
    ours, plain = configs["config"], configs["config_float32"]
    assert ours["trainer"]["callbacks"].pop(0) == {"class_path": "lightning_quartet.QuartetQAT"}
    assert ours["trainer"]["logger"]["init_args"].pop("name") != plain["trainer"]["logger"]["init_args"].pop("name")
    assert ours == plain


def test_the_gpu_recipe_has_sixty_million_parameters() -> None:
    fields = yaml.safe_load((LANGUAGE_MODEL / "config_gpu.yaml").read_text())["model"]["init_args"]["config"]
    with torch.device("meta"):
        parameters = sum(p.numel() for p in CausalLM(fields).parameters())
    assert 60e6 < parameters < 62e6


def test_vocabulary_mismatch_is_explained(tmp_path: Path, short_corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [a for a in cut(tmp_path, short_corpus) if "vocab_size" not in a]
    arguments.append("--model.init_args.config.vocab_size=480")
    with pytest.raises(ValueError, match="tokenizer has 512 tokens but the model's vocab_size is 480"):
        run(monkeypatch, "fit", "--config", str(LANGUAGE_MODEL / "config_float32.yaml"), *arguments)
