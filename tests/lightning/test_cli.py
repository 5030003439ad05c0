"""The command line, in this process."""

import sys
import types

import pytest
import torch
from toy import Toy

import lightning_quartet.cli as cli
from lightning_quartet import QuartetConfig, QuartetQAT

FIT = ["fit", "--model=toy.Toy", "--trainer.accelerator=cpu", "--trainer.max_steps=2", "--trainer.logger=false",
       "--trainer.enable_checkpointing=false", "--trainer.enable_progress_bar=false",
       "--trainer.enable_model_summary=false"]  # fmt: skip


@pytest.fixture
def built(monkeypatch, tmp_path):
    """The LightningCLI objects that main made."""
    monkeypatch.chdir(tmp_path)  # a run without a logger leaves its config.yaml where it began
    made = []

    class Recording(cli._CLI):
        def __init__(self, *args, **kwargs):
            made.append(self)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(cli, "_CLI", Recording)
    monkeypatch.setattr(sys, "argv", ["lightning-quartet"])
    return made


class Remembering(Toy):
    """Its checkpoints hold hyperparameters."""

    def __init__(self, rate: float = 1.0):
        super().__init__()
        self.save_hyperparameters()


def test_options_of_the_model_are_those_that_were_asked_for(built, tmp_path):
    """Not those of the checkpoint."""
    fit = [argument.replace("toy.Toy", "test_cli.Remembering") for argument in FIT]
    assert cli.main([*fit, "--model.rate=2.0"]) == 0
    built[0].trainer.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]["rate"] == 2.0
    assert cli.main([*fit, "--model.rate=3.0", "--ckpt_path=a.ckpt", "--trainer.max_steps=3"]) == 0
    assert built[1].model.hparams.rate == 3.0
    assert built[1].trainer.global_step == 3


def callback_of(built) -> QuartetQAT:
    (callback,) = (c for c in built[0].trainer.callbacks if isinstance(c, QuartetQAT))
    return callback


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--trainer.callbacks+=QuartetQAT"], QuartetConfig()),
        (["--trainer.callbacks+=QuartetQAT", "--trainer.callbacks.config=quartet_stochastic"],
         QuartetConfig(backward_rounding="stochastic")),
        (["--trainer.callbacks+=lightning_quartet.QuartetQAT", "--trainer.callbacks.config.hadamard_group_size=64",
          "--trainer.callbacks.config.seed=3"], QuartetConfig(hadamard_group_size=64, seed=3)),
    ],
)  # fmt: skip
def test_options(built, arguments, expected):
    assert cli.main(FIT + arguments) == 0
    assert callback_of(built).config == expected
    assert built[0].trainer.global_step == 2


def test_yaml_and_all_subcommands(built, tmp_path):
    (tmp_path / "run.yaml").write_text("""
trainer:
  accelerator: cpu
  max_steps: 2
  logger: false
  enable_progress_bar: false
  enable_checkpointing: false
  callbacks:
    - class_path: lightning_quartet.QuartetQAT
      init_args:
        config:
          backward_dtype: bf16
        modules_to_not_convert: [head]
        start_step: 1
        master_dtype: float32
model: {class_path: toy.Toy}
""")
    for subcommand in ("fit", "validate", "test", "predict"):
        built.clear()
        assert cli.main([subcommand, f"--config={tmp_path / 'run.yaml'}"]) == 0
        callback = callback_of(built)
        assert callback.config == QuartetConfig(backward_dtype="bf16")
        assert callback.modules_to_not_convert == ("head",)
        assert callback.start_step == 1


def test_plugin_by_name(built):
    assert cli.main([*FIT, "--trainer.plugins=QuartetPrecision", "--trainer.plugins.precision=bf16-true"]) == 0
    assert built[0].model.net[0].weight.dtype == torch.bfloat16


def test_optimizer_given_on_the_command_line_trains_the_model(built):
    assert cli.main([*FIT, "--trainer.callbacks+=QuartetQAT", "--optimizer=SGD", "--optimizer.lr=0.5"]) == 0
    (optimizer,) = built[0].trainer.optimizers
    assert type(optimizer).__name__ == "SGD"
    assert all(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def test_help_lists_subcommands_and_tools(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-quartet"])
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for word in ("fit", "validate", "test", "predict", "Tools:", "  bench ", "  doctor "):
        assert word in text
    assert max(map(len, text.splitlines())) <= 140


def test_help_of_the_callback(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-quartet"])
    with pytest.raises(SystemExit):
        cli.main(["fit", "--trainer.callbacks.help=QuartetQAT"])
    text = capsys.readouterr().out
    for word in ("start_step", "master_dtype", "the name of a recipe"):
        assert word in text


def test_bad_option_names_it(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning-quartet"])
    with pytest.raises(SystemExit) as stop:
        cli.main([*FIT, "--trainer.callbacks+=QuartetQAT", "--trainer.callbacks.start_steps=3"])
    assert stop.value.code == 2
    assert "start_steps" in capsys.readouterr().err


def test_tools_run_before_lightning_is_asked(monkeypatch):
    seen = []
    module = types.ModuleType("a_tool")
    module.main = lambda argv: seen.append(argv) or 3
    monkeypatch.setitem(sys.modules, "a_tool", module)
    monkeypatch.setitem(cli.TOOLS, "doctor", ("a_tool", "help"))
    monkeypatch.setattr(cli, "LightningCLI", None)
    assert cli.main(["doctor", "--json"]) == 3
    assert seen == [["doctor", "--json"]]
