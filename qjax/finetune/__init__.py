"""Tuning of a quantised model: everything that is not a code, adapters over codes, and codes themselves."""

from qjax.finetune.block import BlockReport, BlockSettings, tune_block
from qjax.finetune.e2e import Settings, Tuned, end_to_end
from qjax.finetune.loop import Options, Result, Step, Task, tune
from qjax.finetune.optimizer import Optimizer
from qjax.finetune.parameters import Trainable, gained, merged, tunable, view
from qjax.finetune.rules import RateRule, assign
from qjax.training.checkpoint import Checkpoints

__all__ = [
    "BlockReport",
    "BlockSettings",
    "Checkpoints",
    "Optimizer",
    "Options",
    "RateRule",
    "Result",
    "Settings",
    "Step",
    "Task",
    "Trainable",
    "Tuned",
    "assign",
    "end_to_end",
    "gained",
    "merged",
    "tunable",
    "tune",
    "tune_block",
    "view",
]
