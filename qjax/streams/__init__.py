"""Activations of all sequences between the blocks of a model."""
