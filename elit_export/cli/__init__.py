"""The command line. This folder is the only place that prints or exits."""

from __future__ import annotations

import logging

import click
from rich.logging import RichHandler

from elit_export.cli.calibrate import calibrate
from elit_export.cli.common import Commands
from elit_export.cli.look import doctor, inspect, verify
from elit_export.cli.make import build, export
from elit_export.cli.measure import bench
from elit_export.cli.prompt import embed
from elit_export.cli.run import demo, sample
from elit_export.cli.train import train, train_classifier


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="elit-export")
def main() -> None:
    """Compile ELIT checkpoints into one engine per compute budget, and sample with them."""
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[RichHandler(show_path=False, show_time=False)]
    )


for command in (demo, train, train_classifier, export, build, calibrate, embed, sample, verify, bench, inspect, doctor):
    main.add_command(command)
