"""Reading Hugging Face folders and the Hub: config.json, safetensors, and the choice of weight files."""

from .folder import SafetensorsCheckpoint, read_safetensors
from .json_files import HuggingFaceError

__all__ = ["HuggingFaceError", "SafetensorsCheckpoint", "read_safetensors"]
