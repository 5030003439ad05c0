"""Language models on packed 4-bit weights: LoRA adapters through the Trainer, generation with a KV cache."""

from pathlib import Path

import lightning.pytorch as pl
import peft
import pytest
import torch
from models import llama, tokens
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import T5Config, T5ForConditionalGeneration

from lightning_quartet import PackedQuartetLinear, QuartetConfig, QuartetQAT, convert_to_quartet, pack_quartet

PACKED = QuartetConfig(store_master_weights=False)
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "lora_dropout": 0.0}


class Tuner(pl.LightningModule):
    def __init__(self, model: torch.nn.Module, lr: float = 2e-2) -> None:
        super().__init__()
        self.model, self.lr = model, lr
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.model(input_ids=batch, labels=batch).loss
        self.losses.append(loss.item())
        return loss

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch).logits

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], self.lr)


def run(**options) -> pl.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return pl.Trainer(accelerator="cpu", **quiet, **options)


@pytest.mark.parametrize("config", [PACKED, QuartetConfig(backward_dtype="bf16", store_master_weights=False)], ids=str)
@pytest.mark.parametrize("packed_first", [False, True])
def test_lora_trains_on_a_packed_base_is_saved_and_loaded(tmp_path: Path, config: QuartetConfig, packed_first: bool):
    data = DataLoader(tokens(4, 16), batch_size=4)
    base = llama(config if packed_first else None)
    tuner = Tuner(peft.get_peft_model(base, peft.LoraConfig(**LORA)))
    run(callbacks=[QuartetQAT(config)], max_epochs=1, limit_train_batches=0).fit(tuner, data)
    layers = [layer for layer in base.modules() if isinstance(layer, PackedQuartetLinear)]
    assert len(layers) == 14
    before = {name: tensor.clone() for name, tensor in tuner.state_dict().items()}

    trainer = run(callbacks=[QuartetQAT(config)], max_epochs=30)
    trainer.fit(tuner, data)
    assert tuner.losses[-1] < 0.6 * tuner.losses[0]
    for name, tensor in tuner.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("lora_" not in name), name

    tuner.model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    again = Tuner(peft.PeftModel.from_pretrained(llama(config), tmp_path))
    (expected,), (logits,) = trainer.predict(tuner, data), trainer.predict(again, data)
    assert torch.equal(logits, expected)


def test_merging_an_adapter_into_packed_weights_is_refused():
    model = peft.get_peft_model(llama(PACKED), peft.LoraConfig(**LORA))
    with pytest.raises(RuntimeError):
        model.merge_and_unload()


def test_generation_with_cache_equals_generation_without():
    model = llama(QuartetConfig())
    prompt = tokens(2, 5)
    expected = model.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=False, eos_token_id=None)
    pack_quartet(model)
    for use_cache in (True, False):
        out = model.generate(prompt, max_new_tokens=12, do_sample=False, use_cache=use_cache, eos_token_id=None)
        assert torch.equal(out, expected)
    assert len(set(expected[:, 5:].flatten().tolist())) > 4


def test_a_packed_t5_runs_though_it_asks_for_the_dtype_of_a_weight():
    torch.manual_seed(0)
    config = T5Config(vocab_size=96, d_model=64, d_kv=32, d_ff=128, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration(config).eval()
    convert_to_quartet(model)
    expected = model(input_ids=tokens(), decoder_input_ids=tokens()).logits
    pack_quartet(model)
    assert torch.equal(model(input_ids=tokens(), decoder_input_ids=tokens()).logits, expected)
