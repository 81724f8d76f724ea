"""Reading GGUF files from untrusted bytes: header, metadata, tensors, and repacking for the kernels."""

from .errors import GGUFError, MissingKeyError
from .file import GGUFFile, read_gguf
from .metadata import Metadata
from .types import StringArray

__all__ = ["GGUFError", "GGUFFile", "Metadata", "MissingKeyError", "StringArray", "read_gguf"]
