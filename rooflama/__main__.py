"""``python -m rooflama`` is the command ``rooflama``."""

from .cli import main

main()
