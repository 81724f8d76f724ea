"""GGUF files, read from untrusted bytes: header, metadata, tensors, and the planes that kernels take."""

from .errors import GGUFError, MissingKeyError
from .file import GGUFFile, read_gguf
from .metadata import Metadata
from .types import StringArray

__all__ = ["GGUFError", "GGUFFile", "Metadata", "MissingKeyError", "StringArray", "read_gguf"]
