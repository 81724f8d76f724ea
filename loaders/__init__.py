"""From files to metadata, tensors, tokenizers, and bytes on a device."""
