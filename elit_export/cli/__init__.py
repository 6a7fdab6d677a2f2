"""The command line, one file a command.

Takes: arguments.  Gives: text on standard output and error, files, an exit status.  May touch: what is named.
This folder is the only place that prints or exits.
"""

from __future__ import annotations

import logging

import click
from rich.logging import RichHandler

from elit_export.cli.bench import bench
from elit_export.cli.build import build
from elit_export.cli.calibrate import calibrate
from elit_export.cli.common import Commands
from elit_export.cli.demo import demo
from elit_export.cli.doctor import doctor
from elit_export.cli.embed import embed
from elit_export.cli.evaluate import evaluate
from elit_export.cli.export import export
from elit_export.cli.inspect import inspect
from elit_export.cli.sample import sample
from elit_export.cli.train import train
from elit_export.cli.train_classifier import train_classifier
from elit_export.cli.verify import verify

COMMANDS = (
    *(demo, train, train_classifier, export, build, calibrate, embed, sample),
    *(verify, bench, evaluate, inspect, doctor),
)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="elit-export")
def main() -> None:
    """Compile ELIT checkpoints into one engine per compute budget, and sample with them."""
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(show_path=False, show_time=False)]
    )


for command in COMMANDS:
    main.add_command(command)
