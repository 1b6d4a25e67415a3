"""Kernels, one folder per operation, usable without qjax. None exists yet: qjax runs on XLA everywhere."""
