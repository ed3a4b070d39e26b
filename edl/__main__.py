"""`python -m edl` is `edl`."""

from edl.cli import main

main()
