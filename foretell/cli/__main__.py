"""``python -m foretell.cli``."""

from foretell.cli import main

main()
