"""Evaluation of a model against its reference: perplexity, KL, agreement, each with a bootstrap interval."""

from qjax.evaluate.evaluation import evaluate, hidden_states, perplexity
from qjax.evaluate.metrics import divergence, token_metrics, token_nll
from qjax.evaluate.reference_cache import TeacherCache
from qjax.evaluate.summary import EvaluationReport, check_finite, summarise

__all__ = [
    "EvaluationReport",
    "TeacherCache",
    "check_finite",
    "divergence",
    "evaluate",
    "hidden_states",
    "perplexity",
    "summarise",
    "token_metrics",
    "token_nll",
]
