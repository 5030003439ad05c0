"""CausalLM: what it builds, learns, logs and refuses."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
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
