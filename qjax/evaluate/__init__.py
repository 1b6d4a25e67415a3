"""Evaluation of a model against its reference: perplexity, KL, agreement, each with a bootstrap interval.

The room can be called: `qjax.evaluate(model, tokens, reference)` is its `evaluate_model`.
"""

import sys
import types
from typing import TYPE_CHECKING

from qjax.evaluate.evaluation import evaluate, hidden_states, perplexity
from qjax.evaluate.metrics import divergence, token_metrics, token_nll
from qjax.evaluate.model import Comparison, compare_models, evaluate_model
from qjax.evaluate.reference_cache import TeacherCache
from qjax.evaluate.summary import Evaluation, EvaluationReport, check_finite, summarise

__all__ = [
    "Comparison",
    "Evaluation",
    "EvaluationReport",
    "TeacherCache",
    "check_finite",
    "compare_models",
    "divergence",
    "evaluate",
    "evaluate_model",
    "hidden_states",
    "perplexity",
    "summarise",
    "token_metrics",
    "token_nll",
]


class Room(types.ModuleType):
    """The module of this room, which is `evaluate_model` where it is called."""

    __call__ = staticmethod(evaluate_model)
    if TYPE_CHECKING:  # the functions of the module, which a type checker does not look for behind `qjax.evaluate`
        compare_models = staticmethod(compare_models)
        divergence = staticmethod(divergence)
        evaluate = staticmethod(evaluate)
        evaluate_model = staticmethod(evaluate_model)
        hidden_states = staticmethod(hidden_states)
        perplexity = staticmethod(perplexity)
        summarise = staticmethod(summarise)
        token_metrics = staticmethod(token_metrics)
        token_nll = staticmethod(token_nll)


sys.modules[__name__].__class__ = Room
