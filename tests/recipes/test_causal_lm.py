"""CausalLM: what it builds, learns, logs and refuses."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader

from lightning_quartet.recipes import CausalLM, LossCurve

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def counting(batches: int = 8) -> DataLoader[torch.Tensor]:
    """Sequences that count upwards: each token follows from the last."""
    start = torch.arange(batches * 4)[:, None]
    return DataLoader((start + torch.arange(17)) % 64, batch_size=4)  # type: ignore[arg-type]


def trainer(folder: Path, **options: object) -> Trainer:
    options = {"max_epochs": 5, "enable_progress_bar": False, "enable_model_summary": False, "logger": False} | options
    return Trainer(accelerator="cpu", default_root_dir=folder, enable_checkpointing=False, **options)  # type: ignore[arg-type]


def test_it_learns_logs_and_draws_its_curve(tmp_path: Path) -> None:
    torch.manual_seed(0)
    curve = LossCurve()
    fit = trainer(tmp_path, callbacks=[curve], log_every_n_steps=4)
    fit.fit(CausalLM(TINY, learning_rate=1e-2, warmup_steps=4), counting(), counting(2))
    assert {"train_loss", "val_loss", "tokens_per_second", "learning_rate"} <= set(fit.callback_metrics)
    first, last = curve.losses["val_loss"][0][1], curve.losses["val_loss"][-1][1]
    assert last < 0.7 * first
    assert [step for step, _ in curve.losses["train_loss"]] == list(range(4, 41, 4))
    assert (tmp_path / "loss_curve.png").read_bytes().startswith(b"\x89PNG")

    restored = LossCurve()
    restored.load_state_dict(curve.state_dict())
    assert restored.losses == curve.losses


def test_a_curve_has_one_point_a_step_and_that_of_one_run(tmp_path: Path) -> None:
    curve = LossCurve()
    for _ in range(2):
        options = {"accumulate_grad_batches": 4, "log_every_n_steps": 1, "max_epochs": 2}
        fit = trainer(tmp_path, callbacks=[curve], **options)
        fit.fit(CausalLM(TINY), counting())
        assert fit.global_step == 4
        assert [step for step, _ in curve.losses["train_loss"]] == [1, 2, 3, 4]
    fit.save_checkpoint(tmp_path / "a.ckpt")
    resumed = LossCurve()
    more = trainer(tmp_path, callbacks=[resumed], **{**options, "max_epochs": 3})
    more.fit(CausalLM(TINY), counting(), ckpt_path=tmp_path / "a.ckpt")
    assert resumed.losses["train_loss"][:4] == curve.losses["train_loss"]
    assert [step for step, _ in resumed.losses["train_loss"]] == [1, 2, 3, 4, 5, 6]


def test_layers_are_compiled_and_adapters_added_on_demand() -> None:
    layers = [CausalLM(TINY, compile_layers=on).model.get_decoder().layers[0] for on in (False, True, "default")]
    assert [layer._compiled_call_impl is not None for layer in layers] == [False, True, True]
    with pytest.raises(RuntimeError, match="Unrecognized mode"):
        CausalLM(TINY, compile_layers="fastest")
    model = CausalLM(TINY, lora={"r": 4, "target_modules": "all-linear"})
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 14
    assert all("lora_" in name for name in trained)


def test_cuda_graphs_do_not_sum_gradients(tmp_path: Path) -> None:
    model = CausalLM(TINY, compile_layers="reduce-overhead")
    fit = trainer(tmp_path, accumulate_grad_batches=2)
    with pytest.raises(ValueError, match="accumulate_grad_batches=2: set it to 1"):
        fit.fit(model, counting())
    assert fit.global_step == 0
    fit = trainer(tmp_path, callbacks=[GradientAccumulationScheduler({0: 2})], max_epochs=1)
    with pytest.raises(ValueError, match="accumulate_grad_batches=2: set it to 1"):
        fit.fit(model, counting())
    assert fit.global_step == 0


def test_a_model_without_a_list_of_layers_is_not_compiled() -> None:
    sizes = {"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}
    CausalLM(sizes)
    with pytest.raises(ValueError, match="a 'gpt2' model has no list of decoder layers"):
        CausalLM(sizes, compile_layers=True)


def test_tokens_per_second_are_those_of_many_steps_that_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device three steps behind, a second a step; validations after 28 of 31 batches."""
    moments: list[int] = []

    class Moment(int):
        def query(self) -> bool:
            return self <= len(moments) - 3

        def elapsed_time(self, end: int) -> float:
            return 1000.0 * (end - self)

    monkeypatch.setattr(f"{CausalLM.__module__}.now", lambda device: moments.append(0) or Moment(len(moments)))
    logged: list[int] = []

    class Logged(CausalLM):
        def log(self, name: str, value: object, **options: object) -> None:
            if name == "tokens_per_second":
                logged.append(self.trainer.global_step)
                assert value == 64  # 4 sequences of 16
            super().log(name, value, **options)  # type: ignore[arg-type]

    fit = trainer(tmp_path, val_check_interval=28, max_epochs=1)
    fit.fit(Logged(TINY), counting(31), counting(1))
    assert fit.global_step == 31
    assert logged == list(range(5, 29))  # and none of the three steps after the validation
    assert fit.callback_metrics["tokens_per_second"] == 64


def test_loss_is_the_mean_negative_log_likelihood_of_the_next_token(tmp_path: Path) -> None:
    model = CausalLM(TINY)
    data = counting(2)
    (result,) = trainer(tmp_path).test(model, data, verbose=False)
    predictions = trainer(tmp_path).predict(model, data)
    assert predictions is not None
    assert predictions[0].shape == (4, 16)
    torch.testing.assert_close(result["test_loss"], torch.cat(predictions).mean().item())


def test_learning_rate_rises_and_falls(tmp_path: Path) -> None:
    class Rates(Callback):
        seen: list[float] = []

        def on_train_batch_start(self, trainer: Trainer, *args: object) -> None:
            self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    fit = trainer(tmp_path, callbacks=[Rates()], max_steps=20)
    fit.fit(CausalLM(TINY, learning_rate=1.0, warmup_steps=4, final_learning_rate=0.1), counting())
    assert Rates.seen[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert Rates.seen[4:] == sorted(Rates.seen[4:], reverse=True)
    assert len(Rates.seen) == 20
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1)
    assert [group["weight_decay"] for group in fit.optimizers[0].param_groups] == [0.1, 0.0]


def test_pretrained_folder_is_loaded_in_float32(tmp_path: Path) -> None:
    model = CausalLM(TINY)
    model.model.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = CausalLM(pretrained=str(tmp_path))
    assert all(module.training for module in loaded.modules())
    for name, parameter in loaded.model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, model.model.get_parameter(name).float())


def test_other_architectures() -> None:
    model = CausalLM({"model_type": "gpt2", "vocab_size": 64, "n_embd": 32, "n_layer": 1, "n_head": 2})
    assert model(torch.zeros(1, 5, dtype=torch.long)).shape == (1, 5, 64)


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="either `config`"):
        CausalLM()
    with pytest.raises(ValueError, match="either `config`"):
        CausalLM(TINY, pretrained="x")
    with pytest.raises(ValueError, match="has no field hiden_size; its fields are: .*hidden_size"):
        CausalLM(TINY | {"hiden_size": 64})
    with pytest.raises(FileNotFoundError, match="not a Hugging Face model folder"):
        CausalLM(pretrained=str(tmp_path))
