"""Readers of dense weights: safetensors, GGUF, Python distributions; and writers."""
