"""Models small enough to export in a moment."""

from pathlib import Path

import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lightning_quartet import QuartetConfig, convert_to_quartet

ONE_LAYER = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}


def llama(config: QuartetConfig | str | None = None, *, tied: bool = False, bias: bool = False) -> LlamaForCausalLM:
    """A Llama of two layers, converted if there is a config."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=96,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
            attention_bias=bias,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.1,
        )
    ).eval()
    if bias:
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.normal_(parameter)
    if config is not None:
        convert_to_quartet(model, config=config)
    return model


def bert(config: QuartetConfig | str | None = None) -> BertModel:
    """An encoder with biases; its pooler stays as it is."""
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=96,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.2,
        )
    ).eval()
    if config is not None:
        convert_to_quartet(model, config=config, modules_to_not_convert=["pooler"])
    return model


def tokenizer(folder: Path) -> None:
    """Save a tokenizer of 96 words beside a model."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 96)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def tokens(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(3))
