"""Converting text to token ids and back: tokenizers, vocabularies, chat templates and their sandbox."""

from .chat_messages import ChatTemplateError
from .opening import open_tokenizer
from .tokenizer import Tokenizer
from .vocabulary import TokenizerError

__all__ = ["ChatTemplateError", "Tokenizer", "TokenizerError", "open_tokenizer"]
