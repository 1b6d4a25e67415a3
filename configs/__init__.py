"""Hydra configuration groups, packaged so that entry points find them after an installation."""
