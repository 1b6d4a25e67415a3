"""Hydra entry points: `python -m experiments.<name>`; no mathematics here."""
