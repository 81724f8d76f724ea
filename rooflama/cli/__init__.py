"""The command ``rooflama``."""

from .commands import app, main

__all__ = ["app", "main"]
