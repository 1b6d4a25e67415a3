"""The program `qjax` by the names of its package: `python -m experiments`, `python -m qjax.experiments`."""

from ._program import main

if __name__ == "__main__":
    main()
