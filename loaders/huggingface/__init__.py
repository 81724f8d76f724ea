"""Hugging Face folders and the Hub: config.json, safetensors, and which files hold the weights."""

from .folder import SafetensorsCheckpoint, read_safetensors
from .json_files import HuggingFaceError

__all__ = ["HuggingFaceError", "SafetensorsCheckpoint", "read_safetensors"]
