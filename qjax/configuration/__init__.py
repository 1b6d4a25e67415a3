"""The configuration of the command line, made of what is registered: groups, defaults, checks, presets, plugins."""
