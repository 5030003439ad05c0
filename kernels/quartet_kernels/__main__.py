"""``python -m quartet_kernels bench | doctor``: tools that need neither Lightning nor its command line."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .files import replacing


def _write(report: dict[str, Any], target: str) -> None:
    content = json.dumps(report, indent=2) + "\n"
    if target == "-":
        print(content, end="")
        return
    with replacing(Path(target)) as path:
        path.write_text(content)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a tool; the exit status is 0, 1 if the doctor's self-test fails, or 2 for a wrong option."""
    prog = "quartet_kernels" if Path(sys.argv[0]).name == "__main__.py" else None
    parser = argparse.ArgumentParser(prog, description="Tools of the MXFP4 training kernels.")
    tools = parser.add_subparsers(dest="tool", required=True)
    bench = tools.add_parser("bench", help="measure the kernels and one linear layer on this machine")
    bench.add_argument(
        "--shapes", nargs="+", metavar="TxIxO", help="tokens x in_features x out_features, like 16384x4096x14336"
    )
    doctor = tools.add_parser("doctor", help="which backend runs here, why, and whether its numbers are right")
    for tool in (bench, doctor):
        tool.add_argument(
            "--json", nargs="?", const="-", metavar="FILE", help="print the report as JSON, or write it to FILE"
        )
    options = parser.parse_args(arguments)
    if options.json not in (None, "-") and Path(options.json).is_dir():
        parser.error(f"--json: {options.json} is a folder; name a file.")
    if options.json not in (None, "-") and not Path(options.json).parent.is_dir():
        parser.error(f"--json: the folder {Path(options.json).parent} does not exist; make it first.")

    # Imported late: `--help` should not wait for torch.
    if options.tool == "bench":
        from . import bench as benchmark

        try:
            shapes = [benchmark.parse_shape(shape) for shape in options.shapes or ()]
        except ValueError as error:
            bench.error(str(error))
        report = benchmark.run(shapes)
        readable = benchmark.tables(report)
    else:
        from . import doctor as check

        report = check.run()
        readable = check.text(report)
    if options.json != "-":
        print(readable)
    if options.json is not None:
        _write(report, options.json)
    return 0 if report.get("ok", True) else 1


if __name__ == "__main__":
    sys.exit(main())
