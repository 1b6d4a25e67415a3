"""Tuning of a quantised model: everything that is not a code, adapters over codes, and codes themselves."""

from qjax.finetune.block import BlockReport, BlockTuning, tune_block
from qjax.finetune.e2e import EndToEnd, end_to_end
from qjax.finetune.loop import Options, Result, Step, Task, tune
from qjax.finetune.methods import TUNINGS, Tuned, TuningMethod, method_of
from qjax.finetune.optimizer import Optimizer, Schedule
from qjax.finetune.parameters import Trainable, gained, merged, tunable, view
from qjax.finetune.rules import RateRule, assign
from qjax.training.checkpoint import Checkpoints

__all__ = [
    "TUNINGS",
    "BlockReport",
    "BlockTuning",
    "Checkpoints",
    "EndToEnd",
    "Optimizer",
    "Options",
    "RateRule",
    "Result",
    "Schedule",
    "Step",
    "Task",
    "Trainable",
    "Tuned",
    "TuningMethod",
    "assign",
    "end_to_end",
    "gained",
    "merged",
    "method_of",
    "tunable",
    "tune",
    "tune_block",
    "view",
]
