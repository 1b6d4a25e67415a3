"""Laws that everything registered obeys, to be held against an algorithm of one's own: `qjax.testing.check`."""

from qjax.testing.check import Outcome, check
from qjax.testing.problems import LawBroken, Refused

__all__ = ["LawBroken", "Outcome", "Refused", "check"]
