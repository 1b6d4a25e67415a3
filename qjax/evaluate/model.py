"""A model on a text in one call, alone or beside its reference; several models in a table."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Mapping, Sequence
from typing import Any

from qjax.data.stream import TokenSplit, as_stream
from qjax.errors import InputError
from qjax.evaluate.evaluation import evaluate, evaluate_alone, hidden_states
from qjax.evaluate.summary import Evaluation
from qjax.models import transformer
from qjax.models.given import checked_model
from qjax.models.linear import bits_per_weight
from qjax.models.loading import Model
from qjax.runtime.progress import Progress, silent

__all__ = ["Comparison", "compare_models", "evaluate_model"]

BATCH = 8  # as the command line's


def evaluate_model(
    model: Model,
    tokens: Any,
    reference: Model | None = None,
    *,
    batch: int = BATCH,
    seed: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Perplexity of a model, and beside a reference the divergence from it.

    Args:
      tokens: of `qjax.data.load` (its evaluation side), or token ids [sequences, length].
      reference: the original model; without one all that compares is None.
      batch: sequences per step.
      seed: of the bootstrap's resamples.
      progress: show it.

    Raises InputError for models of two architectures, DataError for ids outside the vocabulary, NumericsError for
    logits that are not finite.
    """
    with silent(not progress):
        states = None if reference is None else _states(reference, as_stream(tokens, "evaluation").tokens, batch)
        return _evaluated(model, tokens, reference, states, batch, seed)


def _states(model: Model, tokens: Any, batch: int) -> Any:
    checked_model(model, "reference")
    with Progress("reference", model.config.num_layers) as shown:
        return hidden_states(model.params, tokens, model.config, batch, lambda done, total: shown.update(done))


def _evaluated(model: Model, tokens: Any, reference: Model | None, states: Any, batch: int, seed: int) -> Evaluation:
    checked_model(model)
    stream = as_stream(tokens, "evaluation")
    if stream.length > model.config.max_positions:
        raise InputError(f"tokens have {stream.length} positions and the model {model.config.max_positions}")
    tied = model.config.tie_embeddings  # a head of its own makes no other model: folding unties it, files may too
    if reference is not None and dataclasses.replace(reference.config, tie_embeddings=tied) != model.config:
        raise InputError(
            f"reference is {reference.name} and the model {model.name}, of another architecture or size; a model is "
            "compared with the one that it was made of"
        )
    with Progress("evaluate", model.config.num_layers) as shown:
        options: dict[str, Any] = {
            "batch": batch,
            "seed": seed,
            "progress": lambda done, total: shown.update(done),
        }
        if reference is None:
            found = evaluate_alone(model.params, stream, model.config, **options)
        else:
            domains = tokens.rows if isinstance(tokens, TokenSplit) else None
            head = transformer.head(reference.params)
            found = evaluate(states, head, model.params, stream, model.config, domains=domains, **options)
    known = getattr(model, "bits_per_weight", model.stored_bits_per_weight)
    return dataclasses.replace(found, bits_per_weight=bits_per_weight(model.params) if known is None else known)


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison:
    """Models side by side on the same windows.

    Attributes:
      evaluations: by name, in the order in which they were given.
    """

    evaluations: Mapping[str, Evaluation]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row per model: its name and the numbers of its `Evaluation`, as JSON values."""
        return [{"name": name, **found.to_dict()} for name, found in self.evaluations.items()]

    def _cells(self) -> list[list[str]]:
        table = [["model", "bits", "perplexity", "KL", "95% interval", "top-1"]]
        for name, found in self.evaluations.items():
            bits = "" if found.bits_per_weight is None else f"{found.bits_per_weight:.3f}"
            row = [name, bits, f"{found.perplexity:.2f}", "", "", ""]
            if found.kl_mean is not None and found.kl_mean_interval is not None:
                low, high = found.kl_mean_interval
                row[3:] = [f"{found.kl_mean:.4f}", f"[{low:.4f}, {high:.4f}]", f"{found.top1_agreement:.3f}"]
            table.append(row)
        return table

    def __repr__(self) -> str:
        table = self._cells()
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        lines = (
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in table
        )
        return "\n".join(line.rstrip() for line in lines)

    def _repr_html_(self) -> str:
        head, *body = ([html.escape(cell) for cell in row] for row in self._cells())
        rows = "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in body)
        return f"<table><thead><tr><th>{'</th><th>'.join(head)}</th></tr></thead><tbody>{rows}</tbody></table>"


def compare_models(
    models: Mapping[str, Model] | Sequence[Model],
    tokens: Any,
    reference: Model | None = None,
    *,
    batch: int = BATCH,
    seed: int = 0,
    progress: bool = False,
) -> Comparison:
    """The `evaluate_model` of several models, by name, or under their own names with a number where two share one.

    The reference is run once. Raises InputError for no models, and as `evaluate_model`.
    """
    named = dict(models) if isinstance(models, Mapping) else _numbered(models)
    if not named:
        raise InputError("there are no models to compare; give {name: model, …} or a list of models")
    with silent(not progress):
        states = None if reference is None else _states(reference, as_stream(tokens, "evaluation").tokens, batch)
        found = {name: _evaluated(model, tokens, reference, states, batch, seed) for name, model in named.items()}
    return Comparison(found)


def _numbered(models: Sequence[Model]) -> dict[str, Model]:
    own = [getattr(model, "name", "model") for model in models]
    return {
        name if own.count(name) == 1 else f"{name} {own[:index].count(name) + 1}": model
        for index, (name, model) in enumerate(zip(own, models, strict=True))
    }
