"""`python -m elit_export`."""

from elit_export.cli import main

main(prog_name="elit-export")
