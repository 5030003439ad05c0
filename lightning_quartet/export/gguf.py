"""``gguf``: a llama.cpp file with MXFP4 weights (type 39), for Llama models; llama.cpp rotates nothing."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_quartet.export.files import copy_tokenizer, read_json
from lightning_quartet.export.folder import write_config
from lightning_quartet.export.model import ExportedModel
from quartet_kernels import MXFP4Tensor
from quartet_kernels.mxfp4 import unpack_codes

FILE = "model.gguf"
_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_SPLITS: dict[tuple[str | None, ...], str] = {
    ("bytes, split",): "gpt-2",
    ("Digits True", "bytes, split"): "smollm",
    (_LLAMA_3, "bytes"): "llama-bpe",
}
_CONTROL, _NORMAL = 3, 1  # token types


def write_gguf(exported: ExportedModel, folder: Path, shard_bytes: int) -> None:
    """One file, `FILE`; tokenizer and config.json lie beside it, for ``from_pretrained(dir, gguf_file=...)``.

    Raises:
        ValueError: If the model is none that the format's names and its runtimes' formulas are for, or a file of its
            tokenizer is damaged.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    config = exported.model.config
    rope = getattr(config, "rope_parameters", None) or {}
    if config.model_type != "llama" or rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"Format 'gguf' writes Llama models without rope scaling; this is {config.model_type!r} with "
            f"rope_type={rope.get('rope_type')!r}: choose another format."
        )
    if config.hidden_act != "silu":
        raise ValueError(
            f"Format 'gguf' writes Llama models with hidden_act='silu', which runtimes take for granted; this one has "
            f"{config.hidden_act!r}: choose another format."
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    types = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    write_config(exported, folder, None)
    copy_tokenizer(exported.source, folder)
    writer = GGUFWriter(folder / FILE, "llama")
    writer.add_name(str(getattr(config, "name_or_path", "") or "quartet").rstrip("/").rpartition("/")[2])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if exported.source is not None and (exported.source / "tokenizer.json").is_file():
        _add_tokenizer(writer, read_json(exported.source / "tokenizer.json"), config)

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}

    def add(key: str, tensor: Tensor, kind: str) -> None:
        name = _name(key)
        part = name.split(".")[-2]
        if part in heads:
            tensor = _interleave(tensor, heads[part])
        data = tensor.contiguous().view(torch.uint8).numpy() if kind in ("BF16", "MXFP4") else tensor.numpy()
        writer.add_tensor(name, data, raw_dtype=getattr(GGMLQuantizationType, kind))

    for name in exported.progress(list(exported.layers)):
        add(f"{name}.weight", blocks(exported.packed(name)), "MXFP4")
        bias = exported.layers[name].bias
        if bias is not None:
            add(f"{name}.bias", exported.cast(f"{name}.bias", bias, torch.float32), "F32")
    for key, tensor in exported.other_tensors():
        if tensor.dim() == 1:
            add(key, tensor.float(), "F32")
        else:
            add(key, tensor, types[tensor.dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def blocks(packed: MXFP4Tensor) -> Tensor:
    """uint8 [rows, K/32 * 17]: per group its scale byte, then 16 bytes with elements j (low nibble) and j + 16."""
    codes = unpack_codes(packed.codes).unflatten(-1, (-1, 2, 16))
    halves = codes[..., 0, :] | (codes[..., 1, :] << 4)
    return torch.cat((packed.scales[..., None], halves), -1).flatten(-2)


def _name(key: str) -> str:
    module, _, kind = key.rpartition(".")
    if module in _NAMES:
        return f"{_NAMES[module]}.{kind}"
    parts = module.split(".", 3)  # model.layers.N.<name>
    if len(parts) < 4 or parts[3] not in _NAMES:
        raise ValueError(f"Format 'gguf' has no name for {key}; choose another format.")
    return f"blk.{parts[2]}.{_NAMES[parts[3]]}.{kind}"


def _interleave(rows: Tensor, heads: int) -> Tensor:
    # llama.cpp rotates neighbouring rows of a head where transformers rotates its halves.
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _add_tokenizer(writer: Any, tokenizer: dict[str, Any], config: Any) -> None:
    """A byte-level BPE tokenizer; of other kinds llama.cpp needs data that tokenizer.json does not have."""
    model = tokenizer.get("model") or {}
    split = _pre_tokenizer(tokenizer.get("pre_tokenizer"))
    if model.get("type") != "BPE" or split is None:
        return
    if not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
        raise ValueError("tokenizer.json has no vocab or no merges; repair it or leave it out of the folder.")
    tokens = {number: text for text, number in model["vocab"].items()}
    special = {entry["id"]: entry["content"] for entry in tokenizer.get("added_tokens") or []}
    tokens |= special
    texts = [tokens.get(number, f"[PAD{number}]") for number in range(config.vocab_size)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(texts)
    writer.add_token_types([_CONTROL if number in special else _NORMAL for number in range(len(texts))])
    writer.add_token_merges(merges)
    for token, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id)):
        number = getattr(config, f"{token}_token_id", None)
        number = number[0] if isinstance(number, list) and number else number  # the file has room for one
        if isinstance(number, int):
            add(number)


def _pre_tokenizer(steps: Any) -> str | None:
    """What llama.cpp calls the way in which texts are split before BPE; ``None`` where it is none of these."""
    steps = steps.get("pretokenizers", [steps]) if isinstance(steps, dict) else []
    described: list[str | None] = []
    for step in steps:
        if step.get("type") == "Split":
            described.append((step.get("pattern") or {}).get("Regex"))
        elif step.get("type") == "ByteLevel":
            described.append("bytes, split" if step.get("use_regex", True) else "bytes")
        else:
            described.append(f"{step.get('type')} {step.get('individual_digits', '')}")
    return _SPLITS.get(tuple(described))
