"""The examples' language models, small enough to train for a few steps in a test."""

import lzma
from pathlib import Path

ROOT = Path(__file__).parents[1]


def short_corpus(folder: Path) -> Path:
    """A file with the first 24 speeches, so that the tokenizer is made in a moment."""
    text = lzma.decompress((ROOT / "examples" / "language_model" / "sotu.txt.xz").read_bytes()).decode()
    file = folder / "sotu.txt"
    file.write_text("\n# ".join(text.split("\n# ")[:24]), encoding="utf-8")
    return file


def sizes(folder: Path, corpus: Path) -> list[str]:
    """Options for a small model on a text, with its tokenizer in the folder."""
    return [
        "--model.init_args.config.hidden_size=64",
        "--model.init_args.config.intermediate_size=96",
        "--model.init_args.config.num_hidden_layers=2",
        "--model.init_args.config.num_attention_heads=2",
        "--model.init_args.config.num_key_value_heads=1",
        "--model.init_args.config.vocab_size=512",
        f"--data.init_args.path={corpus}",
        "--data.init_args.vocabulary_size=512",
        "--data.init_args.sequence_length=32",
        f"--data.init_args.cache_dir={folder / 'cache'}",
    ]
