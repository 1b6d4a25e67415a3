"""The numbers of one evaluation, from per-token metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from qjax.errors import NumericsError
from qjax.evaluate.bootstrap import RESAMPLES, Interval, mean_interval, quantile_intervals, resample_counts

__all__ = ["EvaluationReport", "check_finite", "summarise"]


@dataclasses.dataclass(frozen=True)
class EvaluationReport:
    """A model against its reference on windows of held-out tokens.

    Every interval is a 95% percentile bootstrap over sequences. Divergences are in nats per predicted token.

    Attributes:
      tokens_evaluation: tokens read, `sequences · context_length`.
      tokens_scored: tokens predicted, all but the first of each window.
      stride: source tokens from one window to the next.
      bos: the BOS policy of the windows.
      tokens_sha256: identity of the windows.
      domains: the numbers of each domain of a mixture, empty for a single source.
    """

    perplexity: float
    perplexity_interval: Interval
    perplexity_reference: float
    perplexity_reference_interval: Interval
    kl_mean: float
    kl_mean_interval: Interval
    kl_median: float
    kl_median_interval: Interval
    kl_p99: float
    kl_p99_interval: Interval
    top1_agreement: float
    top1_agreement_interval: Interval
    tokens_evaluation: int
    tokens_scored: int
    sequences: int
    context_length: int
    stride: int
    bos: str
    tokens_sha256: str
    domains: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def excerpt(self) -> dict[str, Any]:
        """The numbers without the protocol, as JSON values."""
        protocol = ("tokens_evaluation", "context_length", "stride", "bos", "tokens_sha256", "domains")
        return {name: value for name, value in self.to_dict().items() if name not in protocol}

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values (intervals as lists)."""
        fields = dataclasses.asdict(self)
        if not self.domains:
            del fields["domains"]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}


def check_finite(metrics: Mapping[str, np.ndarray], what: str) -> None:
    """Raise NumericsError naming the first sequence and position whose logits were not finite."""
    for name, values in metrics.items():
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            sequence, position = (int(i) for i in bad[0])
            raise NumericsError(
                f"{what}: {name} is {values[sequence, position]} at sequence {sequence}, position {position} "
                f"({len(bad)} of {values.size} positions), so the logits there are not finite; look for NaN or "
                "overflow in the weights or in half-precision activations"
            )


def summarise(
    metrics: Mapping[str, np.ndarray], *, context_length: int, stride: int, bos: str, tokens_sha256: str, seed: int
) -> EvaluationReport:
    """Means, quantiles and intervals of the arrays `[sequences, context_length - 1]` of `token_metrics`.

    `perplexity = exp(mean nll)` over all predicted tokens. All intervals use the same resamples.
    """
    nll, nll_reference, kl = (metrics[name].astype(np.float64) for name in ("nll", "nll_reference", "kl"))
    agree = metrics["agree"].astype(np.float64)
    sequences = kl.shape[0]
    counts = resample_counts(sequences, RESAMPLES, seed)
    median_interval, p99_interval = quantile_intervals(kl, counts, (0.5, 0.99))
    median, p99 = np.quantile(kl, [0.5, 0.99])
    with np.errstate(over="ignore"):  # a hopeless model may exceed the largest float: its perplexity is inf
        return EvaluationReport(
            perplexity=float(np.exp(nll.mean())),
            perplexity_interval=mean_interval(nll, counts, np.exp),
            perplexity_reference=float(np.exp(nll_reference.mean())),
            perplexity_reference_interval=mean_interval(nll_reference, counts, np.exp),
            kl_mean=float(kl.mean()),
            kl_mean_interval=mean_interval(kl, counts),
            kl_median=float(median),
            kl_median_interval=median_interval,
            kl_p99=float(p99),
            kl_p99_interval=p99_interval,
            top1_agreement=float(agree.mean()),
            top1_agreement_interval=mean_interval(agree, counts),
            tokens_evaluation=sequences * context_length,
            tokens_scored=kl.size,
            sequences=sequences,
            context_length=context_length,
            stride=stride,
            bos=bos,
            tokens_sha256=tokens_sha256,
        )
