"""Quantised checkpoints of other tools: how each lays out codes, scales and zeros, and what values they stand for."""
