"""One run from settings to a finished run directory."""
