"""Makes the study's tokens of the Linux kernel's source, as Debian packages it.

    python examples/language_model/study/prepare.py [--out .cache/lightning_quartet/study.safetensors]

The package is linux-source-6.1 (140 MB, GPL-2.0; most files say so in their first line), fetched with `apt-get
download` and not installed; elsewhere give the file with --deb. What is read are its C files and the documentation
(.rst) of at least 200 bytes and at most 200 kB, in the order of the SHA-256 of their paths, until there are enough. The
first 2% of these files are held out. A byte-level BPE tokenizer is trained on the beginning of the others; every file
begins with the token <|endoftext|>. The result holds `train` and `validation`, int16 token ids, and where they come
from.
"""

import argparse
import hashlib
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from lightning_quartet.recipes.downloads import download, make
from lightning_quartet.recipes.text import SEPARATOR, train_tokenizer

PACKAGE = "linux-source-6.1"
SUFFIXES = (".c", ".rst")
SIZES = range(200, 200_001)
HELD_OUT = 0.02


def read_sources(archive: Path) -> list[str]:
    """The texts of the source's files, in the order of their paths' hashes."""
    found = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            content = tar.extractfile(member) if member.name.endswith(SUFFIXES) and member.size in SIZES else None
            if content is not None:
                name = member.name.partition("/")[2]  # without the release
                found[hashlib.sha256(name.encode()).digest()] = content.read().decode("utf-8", "replace")
    return [found[key] for key in sorted(found)]


def first(texts: list[str], size: int) -> Iterator[str]:
    """Texts until they have so many characters."""
    for text in texts:
        yield text
        size -= len(text)
        if size <= 0:
            return


def encode(tokenizer: Tokenizer, texts: list[str], most: int) -> torch.Tensor:
    """The token ids of the texts, each after a separator, cut to at most so many."""
    separator = tokenizer.token_to_id(SEPARATOR)
    parts, count = [], 0
    for start in range(0, len(texts), 256):
        for encoding in tokenizer.encode_batch_fast(texts[start : start + 256], add_special_tokens=False):
            parts.append(torch.tensor([separator, *encoding.ids], dtype=torch.int16))
            count += len(parts[-1])
        if count >= most:
            break
    return torch.cat(parts)[:most]


def tokenize(texts: list[str], options: argparse.Namespace) -> tuple[Tokenizer, dict[str, torch.Tensor]]:
    """A tokenizer, and the tokens of the files for training and of those held out."""
    cut = round(len(texts) * HELD_OUT)
    tokenizer = train_tokenizer(first(texts[cut:], options.tokenizer_characters), options.vocabulary)
    return tokenizer, {
        "train": encode(tokenizer, texts[cut:], options.tokens),
        "validation": encode(tokenizer, texts[:cut], options.validation_tokens),
    }


def prepare(deb: Path, work: Path, out: Path, options: argparse.Namespace) -> None:
    subprocess.run(["dpkg-deb", "-x", str(deb.absolute()), "."], cwd=work, check=True)
    (archive,) = work.glob("usr/src/*.tar.*")
    tokenizer, tokens = tokenize(read_sources(archive), options)
    fields = ["dpkg-deb", "--show", "--showformat=${Package} ${Version}", str(deb.absolute())]
    source = subprocess.run(fields, check=True, capture_output=True, text=True).stdout
    about = {"source": source, "vocabulary": str(options.vocabulary), "tokenizer": tokenizer.to_str()}
    save_file(tokens, out, metadata=about)
    print(source, *(f"{len(values):,} tokens for {name}" for name, values in tokens.items()), sep=", ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(".cache/lightning_quartet/study.safetensors"))
    parser.add_argument("--deb", type=Path, help=f"the package {PACKAGE}, instead of fetching it")
    parser.add_argument("--tokens", type=int, default=46_000_000, help="for training, at most")
    parser.add_argument("--validation_tokens", type=int, default=1_050_000, help="of the files held out, at most")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument(
        "--tokenizer_characters", type=int, default=30_000_000, help="the tokenizer's training text, about"
    )
    options = parser.parse_args()
    if options.vocabulary > 2**15:
        parser.error(f"--vocabulary {options.vocabulary} is more than 32768, what 16-bit token ids can count.")

    def build(work: Path, out: Path) -> None:
        deb = options.deb or download(["apt-get", "download", PACKAGE], "*.deb", None, work)
        prepare(deb, work, out, options)

    make(options.out, build)


if __name__ == "__main__":
    main()
