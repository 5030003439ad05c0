"""The GGUF reader and converter of `examples/finetune_llm`, on a file made here."""

import runpy
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2]
FETCH = runpy.run_path(str(ROOT / "examples" / "finetune_llm" / "fetch.py"))
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "ab", *map(chr, range(ord("c"), ord("z") + 1))]


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def value(item: Any) -> bytes:
    """Type and value as GGUF writes them."""
    if isinstance(item, str):
        return struct.pack("<I", 8) + string(item)
    if isinstance(item, float):
        return struct.pack("<If", 6, item)
    if isinstance(item, int):
        return struct.pack("<II", 4, item)
    one = value(item[0])
    return struct.pack("<I", 9) + one[:4] + struct.pack("<Q", len(item)) + b"".join(value(i)[4:] for i in item)


def q8_0(values: np.ndarray) -> bytes:
    groups = values.reshape(-1, 32)
    scale = (np.abs(groups).max(1, keepdims=True) / 127).astype(np.float16)
    codes = np.round(groups / scale.astype(np.float32)).astype(np.int8)
    return np.concatenate([scale.view(np.uint8), codes.view(np.uint8)], axis=1).tobytes()


def q4_1(values: np.ndarray) -> bytes:
    groups = values.reshape(-1, 32)
    least = groups.min(1, keepdims=True).astype(np.float16)
    scale = ((groups.max(1, keepdims=True) - least) / 15).astype(np.float16)
    codes = np.clip(np.round((groups - least) / scale.astype(np.float32)), 0, 15).astype(np.uint8)
    packed = codes[:, :16] | codes[:, 16:] << 4
    return np.concatenate([scale.view(np.uint8), least.view(np.uint8), packed], axis=1).tobytes()


def write_gguf(path: Path, metadata: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    encoders = {0: lambda v: v.tobytes(), 8: q8_0, 3: q4_1}
    header = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata))
    header += b"".join(string(key) + value(item) for key, item in metadata.items())
    data = b""
    for name, tensor in tensors.items():
        kind = 0 if tensor.ndim == 1 else 8 if name == "token_embd.weight" else 3
        shape = tensor.shape[::-1]
        header += string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, len(data))
        data += encoders[kind](tensor)
        data += bytes(-len(data) % 32)
    path.write_bytes(header + bytes(-len(header) % 32) + data)


def test_conversion_gives_the_model_and_the_tokenizer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(TOKENS),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        )
    )
    names = {ours: theirs for theirs, ours in FETCH["LAYER_NAMES"].items()}
    tensors = {}
    for name, parameter in model.state_dict().items():
        weight = parameter.numpy()
        if name == "lm_head.weight":
            continue
        if name in ("model.embed_tokens.weight", "model.norm.weight"):
            tensors["token_embd.weight" if "embed" in name else "output_norm.weight"] = weight
            continue
        part = names[name.removeprefix("model.layers.0.").removesuffix(".weight")]
        if part in ("attn_q", "attn_k"):
            n = 2 if part == "attn_q" else 1
            weight = weight.reshape(n, 2, len(weight) // n // 2, -1).swapaxes(1, 2).reshape(weight.shape)
        tensors[f"blk.0.{part}.weight"] = np.ascontiguousarray(weight)
    metadata = {
        "llama.vocab_size": len(TOKENS),
        "llama.embedding_length": 32,
        "llama.feed_forward_length": 64,
        "llama.block_count": 1,
        "llama.context_length": 64,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(TOKENS) - 3),
        "tokenizer.chat_template": "{{ messages }}",
    }
    write_gguf(tmp_path / "model.gguf", metadata, tensors)
    FETCH["convert"](tmp_path / "model.gguf", tmp_path / "folder")

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    for name, parameter in model.named_parameters():
        # 4 bits hold a group within half a step of a fifteenth of its range; bfloat16 rounds once more.
        assert torch.allclose(loaded.get_parameter(name), parameter, atol=parameter.abs().max().item() / 12), name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "folder")
    assert tokenizer("<|im_start|>abc")["input_ids"] == [1, 5, 6]


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"something else entirely, of 40 bytes....")
    with pytest.raises(ValueError, match="not a GGUF file of version 3"):
        FETCH["GGUF"](tmp_path / "x.gguf")


@pytest.mark.parametrize("example", ["finetune_llm", "classify_text", "classify_images"])
def test_asking_for_help_fetches_nothing(example, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fetch.py", "--help"])
    with pytest.raises(SystemExit, match="^0$"):
        runpy.run_path(str(ROOT / "examples" / example / "fetch.py"), run_name="__main__")
    assert "default: .cache" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
