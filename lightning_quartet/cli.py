"""The command line: LightningCLI for training, and tools that need no Trainer."""

import importlib
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence

from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.cli import LightningCLI

TOOLS = {
    "bench": ("quartet_kernels.__main__", "measure the kernels on this machine"),
    "export": ("lightning_quartet.export.command", "write a trained model for other libraries, or in 4 bits"),
    "plot": ("lightning_quartet.plot", "draw the losses and the monitor's measures of a run"),
    "doctor": ("quartet_kernels.__main__", "say which backends can run here, and why not"),
}
"""Tools: name, module whose ``main(argv)`` runs it (argv begins with the name), one line of help."""

_DESCRIPTION = """Train, validate, test and predict with MXFP4 matrix products.

The model and the data are named by class path, best in a YAML file:
  lightning-quartet fit --config examples/language_model/config.yaml
  lightning-quartet fit --config run.yaml --trainer.callbacks+=QuartetQAT --trainer.callbacks.config=quartet_stochastic

Tools:
"""


class _HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the description's lines."""


class _CLI(LightningCLI):
    """The YAML and the command line name the model."""

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would put the hyperparameters of ``--ckpt_path`` in place of what was asked for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``lightning-quartet``; returns the exit status.

    Args:
        argv: Arguments without the program's name; ``None`` means those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in TOOLS:
        # Before LightningCLI is built: tools have their own options and start faster.
        return importlib.import_module(TOOLS[arguments[0]][0]).main(arguments) or 0
    tools = "\n".join(f"  {name:<10} {text}" for name, (_, text) in TOOLS.items())
    _CLI(
        args=None if argv is None else arguments,
        parser_kwargs={
            "description": _DESCRIPTION + tools,
            "prog": "lightning-quartet",
            "formatter_class": _HelpFormatter,
        },
        save_config_kwargs={"overwrite": True},
    )
    return 0
