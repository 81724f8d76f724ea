"""Hugging Face folders and the Hub: config.json, safetensors, and which files hold the weights."""
