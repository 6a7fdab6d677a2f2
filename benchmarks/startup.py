"""How long commands take before they do anything, beside a bare import of NumPy and Pillow.

    python benchmarks/startup.py [--rounds 9] [--doctor]

Whole processes, in turn, so that a slow moment of the machine hits all of them: medians, and their ratio to the bare
import. `--doctor` adds all of `doctor`, several seconds a round.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from functools import partial

from elit_export.bench.timing import timed_in_turn
from elit_export.cli import COMMANDS

BARE = "import numpy, PIL"
HELP = ("", *COMMANDS, "bench engines", "calibrate cache")


def run(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)


def elit_export(command: str) -> Callable[[], None]:
    return partial(run, "-m", "elit_export", *command.split())


def first_line_of_doctor() -> None:
    """Until there is something to read; then it is stopped."""
    command = [sys.executable, "-m", "elit_export", "doctor"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        assert child.stdout
        child.stdout.readline()
        child.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--doctor", action="store_true")
    options = parser.parse_args()
    commands: dict[str, Callable[[], object]] = {
        BARE: partial(run, "-c", BARE),
        "from elit_export import Pipeline": partial(run, "-c", "from elit_export import Pipeline"),
        **{" ".join(f"elit-export {command} --help".split()): elit_export(f"{command} --help") for command in HELP},
        "elit-export doctor --quick": elit_export("doctor --quick"),
        "elit-export doctor, first line": first_line_of_doctor,
    }
    if options.doctor:
        commands["elit-export doctor"] = elit_export("doctor")
    timings = timed_in_turn(commands, rounds=options.rounds, warmup=1)
    print(f"{'':<36}{'median ms':>10}{'10%':>8}{'90%':>8}{'/ bare':>8}")
    for name, timing in timings.items():
        numbers = f"{timing.median_ms:>10.0f}{timing.low_ms:>8.0f}{timing.high_ms:>8.0f}"
        print(f"{name:<36}{numbers}{timing.median_ms / timings[BARE].median_ms:>8.2f}")


if __name__ == "__main__":
    main()
