"""Options of training the embedded model, with their defaults and ranges; read without importing."""

from __future__ import annotations

import dataclasses

from qjax.registry import Count, Natural, NotNegative, Positive, Share

__all__ = ["TinyModel", "TinyText", "Training", "TrainingSchedule"]


@dataclasses.dataclass(frozen=True)
class TinyText:
    """The training documents.

    Attributes:
      docstrings: add the docstrings of the standard library to the training part of the documentation topics.
      topic_repeats: the topics are read this many times per epoch: they are the domain of the held-out text.
    """

    docstrings: bool = True
    topic_repeats: Count = 2


@dataclasses.dataclass(frozen=True)
class TinyModel:
    """The sizes of the model: a Llama, or with experts a Mixtral.

    Attributes:
      experts: of every block, each of intermediate_size features; 0 is one MLP for all tokens.
      active: experts of a token.
    """

    vocab_size: Count = 2048
    hidden_size: Count = 192
    intermediate_size: Count = 384
    num_layers: Count = 4
    num_heads: Count = 6
    num_kv_heads: Count = 2
    head_dim: Count = 32
    max_positions: Count = 256
    experts: Natural = 0
    active: Count = 2


@dataclasses.dataclass(frozen=True)
class TrainingSchedule:
    """The schedule of AdamW, as of `qjax.training.step.Schedule`."""

    steps: Count = 1000
    learning_rate: Positive = 0.015
    warmup: Natural = 50
    final_share: Share = 0.02
    weight_decay: NotNegative = 0.1
    clip: Positive = 1.0


@dataclasses.dataclass(frozen=True)
class Training:
    """Options of `train_tiny`.

    Attributes:
      seed: of weights and order.
      out: run directory; the model appears as <out>/model.
      install: also replaces qjax/models/tiny (with experts, tiny_moe), which the package ships; may be given to a
        finished run.
      machine: a description for the record; null records the number of cores and the architecture.
      text: the training documents.
      model: the sizes.
      schedule: of the optimiser.
      batch: windows of model.max_positions tokens.
      evaluate_every: steps between evaluations.
      checkpoint_every: steps between checkpoints.
      log_every: steps between lines.
    """

    seed: Natural = 0
    out: str = "runs/train_tiny"
    install: bool = False
    machine: str | None = None
    text: TinyText = TinyText()
    model: TinyModel = TinyModel()
    schedule: TrainingSchedule = TrainingSchedule()
    batch: Count = 8
    evaluate_every: Count = 100
    checkpoint_every: Count = 50
    log_every: Count = 10
