"""`python -m lbr_dist` is the `lbr` command."""

from lbr_dist.cli import main

main()
