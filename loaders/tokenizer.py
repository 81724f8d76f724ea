"""``Tokenizer``, also importable from here, where it was before ``loaders/text`` existed."""

from .text.tokenizer import Tokenizer

__all__ = ["Tokenizer"]
