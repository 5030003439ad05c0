"""LightningModules, DataModules and callbacks that the YAML files in `examples/` name; needs the extra `examples`."""

try:
    import matplotlib  # noqa: F401
    import tokenizers  # noqa: F401
    import transformers  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"lightning_quartet.recipes needs {error.name!r}, which comes with the extra `examples`: "
        "pip install -e '.[examples]' in the root of the clone.",
        name=error.name,
    ) from error

from lightning_quartet.recipes.callbacks import LossCurve, TextSample
from lightning_quartet.recipes.causal_lm import CausalLM
from lightning_quartet.recipes.classifiers import ImageClassifier, TextClassifier
from lightning_quartet.recipes.labelled import FashionMNISTDataModule, LabelledTextDataModule
from lightning_quartet.recipes.text import TextDataModule

__all__ = [
    "CausalLM",
    "FashionMNISTDataModule",
    "ImageClassifier",
    "LabelledTextDataModule",
    "LossCurve",
    "TextClassifier",
    "TextDataModule",
    "TextSample",
]
