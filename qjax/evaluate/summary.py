"""The numbers of one evaluation, from per-token metrics."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from qjax.errors import NumericsError
from qjax.evaluate.bootstrap import RESAMPLES, Interval, mean_interval, quantile_intervals, resample_counts

__all__ = ["Evaluation", "EvaluationReport", "check_finite", "summarise"]

Bounds: TypeAlias = Interval | None


@dataclasses.dataclass(frozen=True, repr=False)
class Evaluation:
    """A model on windows of held-out tokens, beside its reference where there is one; else that part is None.

    Every interval is a 95% percentile bootstrap over sequences. Divergences are in nats per predicted token.

    Attributes:
      tokens_evaluation: tokens read, `sequences · context_length`.
      tokens_scored: tokens predicted, all but the first of each window.
      stride: source tokens from one window to the next.
      bos: the BOS policy of the windows.
      tokens_sha256: identity of the windows.
      domains: the numbers of each domain of a mixture, empty for a single source.
      bits_per_weight: of the model's linears, where it is known.
    """

    perplexity: float
    perplexity_interval: Interval
    tokens_evaluation: int
    tokens_scored: int
    sequences: int
    context_length: int
    stride: int
    bos: str
    tokens_sha256: str
    perplexity_reference: float | None = None
    perplexity_reference_interval: Bounds = None
    kl_mean: float | None = None
    kl_mean_interval: Bounds = None
    kl_median: float | None = None
    kl_median_interval: Bounds = None
    kl_p99: float | None = None
    kl_p99_interval: Bounds = None
    top1_agreement: float | None = None
    top1_agreement_interval: Bounds = None
    domains: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    bits_per_weight: float | None = None

    def excerpt(self) -> dict[str, Any]:
        """The numbers without the protocol, as JSON values."""
        protocol = ("tokens_evaluation", "context_length", "stride", "bos", "tokens_sha256", "domains")
        return {name: value for name, value in self.to_dict().items() if name not in protocol}

    def to_dict(self) -> dict[str, Any]:
        """The fields that are known, as JSON values (intervals as lists)."""
        known = {name: value for name, value in dataclasses.asdict(self).items() if value not in (None, {})}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in known.items()}

    def __repr__(self) -> str:
        low, high = self.perplexity_interval
        parts = [f"perplexity {self.perplexity:.2f} [{low:.2f}, {high:.2f}]"]
        if self.perplexity_reference is not None:
            parts += [f"reference {self.perplexity_reference:.2f}"]
        if self.kl_mean is not None and self.kl_mean_interval is not None:
            low, high = self.kl_mean_interval
            parts += [f"KL {self.kl_mean:.4f} [{low:.4f}, {high:.4f}]", f"top-1 agreement {self.top1_agreement:.3f}"]
        if self.bits_per_weight is not None:
            parts += [f"{self.bits_per_weight:.3f} bits per weight"]
        return f"Evaluation({', '.join(parts)}, {self.tokens_evaluation} tokens)"


EvaluationReport: TypeAlias = Evaluation
"""The name that it had before a reference could be missing."""


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
) -> Evaluation:
    """Means, quantiles and intervals of the arrays `[sequences, context_length - 1]` of `token_metrics`.

    `perplexity = exp(mean nll)` over all predicted tokens. All intervals use the same resamples. Of "nll" alone the
    perplexity.
    """
    nll = metrics["nll"].astype(np.float64)
    sequences = nll.shape[0]
    counts = resample_counts(sequences, RESAMPLES, seed)
    with np.errstate(over="ignore"):  # a hopeless model may exceed the largest float: its perplexity is inf
        return Evaluation(
            perplexity=float(np.exp(nll.mean())),
            perplexity_interval=mean_interval(nll, counts, np.exp),
            tokens_evaluation=sequences * context_length,
            tokens_scored=nll.size,
            sequences=sequences,
            context_length=context_length,
            stride=stride,
            bos=bos,
            tokens_sha256=tokens_sha256,
            **(_against_reference(metrics, counts) if "kl" in metrics else {}),
        )


def _against_reference(metrics: Mapping[str, np.ndarray], counts: np.ndarray) -> dict[str, Any]:
    nll_reference, kl, agree = (metrics[name].astype(np.float64) for name in ("nll_reference", "kl", "agree"))
    median_interval, p99_interval = quantile_intervals(kl, counts, (0.5, 0.99))
    median, p99 = np.quantile(kl, [0.5, 0.99])
    return {
        "perplexity_reference": float(np.exp(nll_reference.mean())),
        "perplexity_reference_interval": mean_interval(nll_reference, counts, np.exp),
        "kl_mean": float(kl.mean()),
        "kl_mean_interval": mean_interval(kl, counts),
        "kl_median": float(median),
        "kl_median_interval": median_interval,
        "kl_p99": float(p99),
        "kl_p99_interval": p99_interval,
        "top1_agreement": float(agree.mean()),
        "top1_agreement_interval": mean_interval(agree, counts),
    }
