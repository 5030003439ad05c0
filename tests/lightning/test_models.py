"""Models of transformers and peft, built small from their configs."""

import pytest
import torch
from torch import nn
from toy import Toy, make, trainer

from lightning_quartet import QuartetLinear, QuartetQAT, convert_to_quartet, set_quartet_step

transformers = pytest.importorskip("transformers")

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(**options) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=64, max_position_embeddings=32, **SMALL, **options)
    return transformers.LlamaForCausalLM(config)


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64,
        num_labels=3,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **SMALL,
    )
    return transformers.BertForSequenceClassification(config)


def vit() -> nn.Module:
    torch.manual_seed(0)
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=16, patch_size=8, num_labels=3, **SMALL)
    )


def token_inputs(labels: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(0)), "labels": labels}


@pytest.mark.parametrize(
    ("build", "inputs", "converted", "kept"),
    [
        (llama, lambda: token_inputs(torch.ones(2, 8, dtype=torch.long)), 14, {"lm_head"}),
        (bert, lambda: token_inputs(torch.tensor([0, 2])), 13, {"classifier"}),
        (vit, lambda: {"pixel_values": torch.ones(2, 3, 16, 16), "labels": torch.tensor([0, 2])}, 12, {"classifier"}),
    ],
)
def test_transformers_models_convert_and_learn(build, inputs, converted, kept):
    model = build()
    report = convert_to_quartet(model)
    assert len(report.converted) == converted
    assert set(report.skipped) == kept
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    losses = []
    for step in range(12):
        set_quartet_step(model, step)
        loss = model(**inputs()).loss
        losses.append(loss.item())
        loss.backward()
        assert all(p.grad is not None for m in model.modules() if isinstance(m, QuartetLinear) for p in m.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("patterns", [None, []])
def test_tied_llama_head(patterns):
    model = llama(tie_word_embeddings=True)
    convert_to_quartet(model, modules_to_not_convert=patterns)
    assert isinstance(model.lm_head, QuartetLinear) == (patterns == [])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    set_quartet_step(model, 0)
    model(**token_inputs(torch.ones(2, 8, dtype=torch.long))).loss.backward()
    assert torch.isfinite(model.lm_head.weight.grad).all()


def test_llama_saves_and_loads_as_itself(tmp_path):
    model = llama()
    convert_to_quartet(model)
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert not any(isinstance(m, QuartetLinear) for m in loaded.modules())
    for (name, a), (other, b) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b)


@pytest.mark.parametrize("adapters_first", [True, False])
def test_lora_adapters_are_never_converted(adapters_first):
    peft = pytest.importorskip("peft")
    model = llama()
    lora = peft.LoraConfig(r=32, target_modules=["q_proj", "v_proj"])  # a rank that would fit
    if not adapters_first:
        convert_to_quartet(model)
    model = peft.get_peft_model(model, lora)
    if adapters_first:
        report = convert_to_quartet(model)
        assert sum("LoRA" in reason for reason in report.skipped.values()) == 8
    quartet = [name for name, m in model.named_modules() if isinstance(m, QuartetLinear)]
    assert len(quartet) == 14
    assert not any("lora_" in name for name in quartet)

    class Wrapped(Toy):
        def __init__(self):
            super().__init__()
            self.net = model

        def training_step(self, batch, batch_idx):
            return self.net(**token_inputs(torch.ones(2, 8, dtype=torch.long))).loss

        def configure_optimizers(self):
            return torch.optim.SGD([p for p in self.net.parameters() if p.requires_grad], 0.1)

    frozen = model.base_model.model.model.layers[0].mlp.up_proj.weight.clone()
    trainer(callbacks=[QuartetQAT()], limit_train_batches=3, limit_val_batches=0).fit(make(Wrapped))
    trained = [p for name, p in model.named_parameters() if "lora_B" in name]
    assert len(trained) == 4
    assert all(p.any() for p in trained)
    assert torch.equal(frozen, model.base_model.model.model.layers[0].mlp.up_proj.weight)
