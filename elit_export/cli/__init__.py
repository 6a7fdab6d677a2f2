"""The command line, one file a command.

Takes: arguments.  Gives: text on standard output and error, files, an exit status.  May touch: what is named.
This folder is the only place that prints or exits. A command's file is imported when the command is called, and
imports what it runs inside its functions, so that help comes at once.
"""

from __future__ import annotations

import logging
import warnings

import click

from elit_export.cli.groups import Commands, Deferred
from elit_export.cli.printable import PrintableFormatter, printable_line

# command → the first sentence of its help
COMMANDS = {
    "demo": "Build the shipped model's engines and draw one picture: a row per budget, and one that mixes them.",
    "train": "Train a model on DATA: IDX files, or one folder of images per class.",
    "train-classifier": "Train the evaluator of `evaluate`, on DATA: IDX files, or one folder of images per class.",
    "export": "Export CHECKPOINT as one ONNX graph for every budget.",
    "init": "Write a commented recipe for CHECKPOINT: what it holds, rows, profiles, and a table per target.",
    "build": "Build RECIPE's engines into a bundle and compare each profile with PyTorch.",
    "calibrate": "Measure a bundle's engines along real trajectories: for solvers, the step cache and quantization.",
    "tune": "Search samplings within a time or of a quality, and write the best into BUNDLE as presets.",
    "embed": "Embed prompts by the text encoder in FOLDER, for `sample --prompts` on machines without it.",
    "sample": "Sample images from BUNDLE into a PNG grid and a .npz.",
    "verify": "Compare BUNDLE's engines with PyTorch: every profile at its corners, and whole trajectories.",
    "bench": "Measure BUNDLE's engines.",
    "evaluate": "Measure the quality of BUNDLE's samples, as a classifier of real images sees it.",
    "inspect": "Show what a checkpoint or a bundle holds: shapes, budgets, FLOPs, profiles, plans, versions, presets.",
    "doctor": "Show which backends and tools work on this machine, which do not, why, and what to type.",
}


def _plain_warning(message: Warning | str, *_: object, **__: object) -> str:
    """Leave out the file and the line, which are of this package."""
    return f"warning: {printable_line(str(message))}\n"


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="elit-export")
@click.option("-v", "--verbose", count=True, help="Log what is done; -vv also what libraries do.")
@click.option("-q", "--quiet", is_flag=True, help="No progress bars and no warnings; results and errors only.")
def main(verbose: int, quiet: bool) -> None:
    """Compile ELIT checkpoints into one engine per compute budget, and sample with them."""
    from rich.console import Console
    from rich.logging import RichHandler

    if verbose and quiet:
        raise click.UsageError("-v and -q exclude each other: leave one out")
    warnings.formatwarning = _plain_warning
    if quiet:
        warnings.simplefilter("ignore")
    handler = RichHandler(console=Console(stderr=True), show_path=False, show_time=False)
    handler.setFormatter(PrintableFormatter("%(message)s"))
    logging.basicConfig(level=logging.ERROR if quiet else logging.WARNING, handlers=[handler])
    if verbose:
        logging.getLogger(None if verbose > 1 else "elit_export").setLevel(logging.DEBUG)


for name, short_help in COMMANDS.items():
    main.add_command(Deferred(name, short_help))
