"""``ChatTemplate``, also importable from here, where it was before ``loaders/text`` existed."""

from .text.chat_template import ChatTemplate

__all__ = ["ChatTemplate"]
