"""bench: measure what a bundle's engines cost, a command for each question."""

from __future__ import annotations

from pathlib import Path

import click

from elit_export.cli.bench.backends import backends
from elit_export.cli.bench.engines import engines
from elit_export.cli.bench.memory import memory, soak
from elit_export.cli.bench.samplings import cache, samplers
from elit_export.cli.common import say
from elit_export.errors import InputError

# Of the time when `bench` was one command with flags: flag → the command, and what its options are called now.
FLAGS = {
    "--samplers": ("samplers", {"--rows": "--images"}),
    "--cache-sweep": ("cache", {"--rows": "--images"}),
    "--backends": ("backends", {}),
    "--soak": ("soak", {"--soak": "--samplings"}),
}


class BenchGroup(click.Group):
    """Takes its first form too, with a warning: `bench BUNDLE --cache-sweep` for `bench cache BUNDLE`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and Path(args[0]).is_dir():
            args = _renamed(args)
        return super().parse_args(ctx, args)


def _renamed(args: list[str]) -> list[str]:
    if "--quality" in args:
        raise InputError("`bench BUNDLE --quality` is now a command of its own", "elit-export evaluate BUNDLE")
    flag = next((flag for flag in FLAGS if flag in args), None)
    command, names = FLAGS[flag] if flag else ("engines", {})
    kept = [names.get(arg, arg) for arg in args if arg != flag or arg in names]
    say(f"`bench BUNDLE …` is now `bench {command} BUNDLE …`, and goes with the next version", json_to="-")
    return [command, *kept]


@click.group(cls=BenchGroup)
def bench() -> None:
    """Measure BUNDLE's engines. Quality of samples: elit-export evaluate."""


for command in (engines, samplers, cache, backends, memory, soak):
    bench.add_command(command)
