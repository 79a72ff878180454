"""`python -m parameternet`: the command line."""

from parameternet.cli import main

main(prog_name="parameternet")
