"""The wheel and what importing the packages needs."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATHS = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])


def run_python(code: str) -> str:
    """Standard output of ``code`` in a new interpreter, started in the repository's root."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": PATHS}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    source = tmp_path_factory.mktemp("source")
    target = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("lightning_quartet", "kernels", "tests", "examples"):  # the last two must stay out of the wheel
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(source)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = target.glob("*.whl")
    return zipfile.ZipFile(file)


def test_wheel_holds_exactly_the_two_packages(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"lightning_quartet", "quartet_kernels"}


def test_wheel_holds_every_module_and_the_type_marker(wheel: zipfile.ZipFile) -> None:
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / "lightning_quartet").rglob("*.py")}
    modules |= {str(p.relative_to(ROOT / "kernels")) for p in (ROOT / "kernels").rglob("*.py")}
    assert modules | {"lightning_quartet/py.typed", "quartet_kernels/py.typed"} <= set(wheel.namelist())


def test_wheel_has_the_licence_and_the_command(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "lightning-quartet = lightning_quartet.__main__:main" in wheel.read(entry_points).decode()
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_transformers_does_not_take_our_source_root_for_the_package_kernels() -> None:
    code = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
    assert not (ROOT / "kernels" / "__init__.py").exists()


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""


def test_kernels_work_without_triton_lightning_and_a_gpu() -> None:
    code = BLOCK.format(blocked={"triton", "lightning", "lightning_quartet", "transformers"}) + (
        "import torch\n"
        "from quartet_kernels import QuartetConfig, quartet_linear\n"
        "x, w = torch.randn(4, 64, requires_grad=True), torch.randn(32, 64, requires_grad=True)\n"
        "quartet_linear(x, w, config=QuartetConfig(backend='reference')).sum().backward()\n"
        "print(tuple(x.grad.shape), 'triton' in sys.modules)"
    )
    assert run_python(code) == "(4, 64) False"


def test_the_callback_package_imports_without_triton_and_the_recipes() -> None:
    code = BLOCK.format(blocked={"triton"}) + (
        "import lightning_quartet\nlightning_quartet.QuartetQAT()\nprint('lightning_quartet.recipes' in sys.modules)"
    )
    assert run_python(code) == "False"


def test_recipes_without_their_extra_say_what_to_install() -> None:
    # Other packages look for tokenizers on import too, so it is hidden only after them.
    code = (
        "import lightning_quartet, sys\nfor name in [n for n in sys.modules if n.partition('.')[0] == 'tokenizers']:\n"
        "    del sys.modules[name]\n"
        + BLOCK.format(blocked={"tokenizers"})
        + "try:\n    import lightning_quartet.recipes\nexcept ModuleNotFoundError as error:\n    print(error)"
    )
    assert ".[examples]" in run_python(code)


def test_docstrings_hold_no_sphinx_roles():
    """The API pages are Markdown, which prints them as they are."""
    roles = re.compile(r":(class|func|mod|attr|meth|data|exc):`|Example::")
    for package in ("lightning_quartet", "kernels"):
        for path in (ROOT / package).rglob("*.py"):
            assert not roles.search(path.read_text()), path
