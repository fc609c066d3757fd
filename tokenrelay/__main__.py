"""``python -m tokenrelay``."""

from tokenrelay.service.cli import main

main()
