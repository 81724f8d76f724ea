"""Files to config facts, tensors, tokenizers, and bytes on a device."""
