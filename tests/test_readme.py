"""Every Python block of the documents runs, every `lightning-quartet` command parses, and CI runs the README's line."""

import argparse
import re
import shlex
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([ROOT / "README.md", *ROOT.glob("examples/*/README.md"), *ROOT.glob("docs/**/*.md")])
TRAINER_COMMANDS = ("fit", "validate", "test", "predict")


def blocks(language: str) -> list[pytest.param]:  # type: ignore[valid-type]
    """Fenced blocks of a language; one with words after the language (```` ```python gpu ````) is not run here."""
    found = []
    for document in DOCUMENTS:
        matches = re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), flags=re.MULTILINE | re.DOTALL)
        name = document.relative_to(ROOT)
        found += [pytest.param(block, id=f"{name}-{number}") for number, block in enumerate(matches)]
    return found


def commands(program: str) -> list[list[str]]:
    """The commands of all shell blocks that begin with this program."""
    found = {}
    for block in blocks("bash"):
        for line in block.values[0].replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                if words[:1] == [program]:
                    found[shlex.join(words)] = words
    return list(found.values())


def parameters(lines: list[list[str]]) -> list[pytest.param]:  # type: ignore[valid-type]
    return [pytest.param(words, id=shlex.join(words)[:80]) for words in lines]


OURS = commands("lightning-quartet")


def pages() -> list[pytest.param]:  # type: ignore[valid-type]
    """The Python blocks of each document."""
    found: dict[str, list[str]] = {}
    for block in blocks("python"):
        found.setdefault(block.id.rpartition("-")[0], []).append(block.values[0])
    return [pytest.param(codes, id=name) for name, codes in found.items()]


@pytest.mark.parametrize("codes", pages())
def test_python_blocks_run(codes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the page's first to its last, one after the other, as a reader would."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for number, code in enumerate(codes):
        exec(compile(code, f"block {number}", "exec"), names)


@pytest.mark.parametrize("words", parameters([words for words in OURS if words[1] in TRAINER_COMMANDS]))
def test_commands_parse(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_quartet.__main__ import main

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [*words, "--print_config"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code in (0, None)
    assert "trainer:" in capsys.readouterr().out


@pytest.mark.parametrize("words", parameters([words for words in OURS if words[1] not in TRAINER_COMMANDS]))
def test_tools_take_these_options(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_quartet.cli import TOOLS, main

    assert words[1] in TOOLS
    parse = argparse.ArgumentParser.parse_args

    class Parsed(Exception):
        pass

    def stop(self: argparse.ArgumentParser, *arguments: object) -> None:
        parse(self, *arguments)  # type: ignore[call-overload]  # a wrong option leaves with SystemExit
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    with pytest.raises(Parsed):
        main(words[1:])


def test_scripts_are_there() -> None:
    scripts = [words[1] for words in commands("python") if words[1].endswith(".py")]
    assert "examples/compare.py" in scripts
    for script in scripts:
        assert (ROOT / script).is_file(), script


def test_one_line_runs_the_main_job_and_one_passes_the_tests() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert [line for line in lines if line.startswith('pip install -e ".[examples]" && lightning-quartet fit')] == [
        'pip install -e ".[examples]" && lightning-quartet fit --config examples/language_model/config.yaml'
    ]
    assert [line for line in lines if line.startswith('pip install -e ".[test]" &&')] == [
        'pip install -e ".[test]" && pytest'
    ]


def test_links_between_documents_lead_somewhere() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.relative_to(ROOT)}: {target}"
