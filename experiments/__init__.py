"""Hydra entry points, no mathematics: `qjax <name>` or `python -m qjax.experiments.<name>`.

In a clone also `python -m experiments.<name>`. An installation has this folder as `qjax/experiments`, so its modules
import each other relatively.
"""

from ._program import refuse_a_stranger

refuse_a_stranger()
