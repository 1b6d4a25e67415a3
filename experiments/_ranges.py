"""Ranges of the numbers in `configs/` that do not depend on anything else; the rest is checked where it is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping

__all__ = ["LIMITS"]

_Limit = tuple[Callable[[float], bool], str]
_COUNT: _Limit = (lambda x: x >= 1, "a number of things, at least 1")
_NOT_NEGATIVE: _Limit = (lambda x: x >= 0, "not negative")
_POSITIVE: _Limit = (lambda x: x > 0, "greater than 0")
_SHARE: _Limit = (lambda x: 0 <= x <= 1, "a share, 0 to 1")
_PART: _Limit = (lambda x: 0 < x < 1, "a share, greater than 0 and less than 1")
_DECAY: _Limit = (lambda x: 0 <= x < 1, "at least 0 and less than 1")

_BY_LIMIT: list[tuple[_Limit, str]] = [
    (_COUNT, "data.calibration_sequences data.evaluation_sequences data.length hessian.batch evaluate.batch batch"),
    (_COUNT, "rounding.block rounding.rows rounding.chunk scale.group_size codebook.budget_mib hessian.rounds"),
    (_COUNT, "finetune.sequences finetune.batch finetune.accumulate finetune.tokens finetune.chunk finetune.epochs"),
    (_COUNT, "finetune.validate_every finetune.checkpoint_every finetune.lora.rank finetune.topk hessian.sequences"),
    (
        _COUNT,
        "max_new_tokens top_k repeats tokens length seeds rank ring_mib limit distributed.processes incoherence.block",
    ),
    (
        _COUNT,
        "evaluate_every checkpoint_every log_every schedule.steps text.topic_repeats model.vocab_size",
    ),
    (
        _COUNT,
        "model.hidden_size model.intermediate_size model.num_heads model.num_kv_heads model.head_dim model.num_layers",
    ),
    (_NOT_NEGATIVE, "seed codebook.seed hessian.seed hessian.fit_sequences scale.shrink_steps rounding.passes damping"),
    (_NOT_NEGATIVE, "rounding.output_damping finetune.patience finetune.validation finetune.optimizer.decay fewshot"),
    (
        _NOT_NEGATIVE,
        "temperature least_seconds distributed.process schedule.weight_decay schedule.warmup codebook.overlap",
    ),
    (
        _POSITIVE,
        "codebook.rms scale.rms memory.device_gb memory.host_gb memory.disk_gb evaluate.sanity_perplexity bits",
    ),
    (
        _POSITIVE,
        "hessian.budget_gb hessian.checkpoint_s finetune.optimizer.eps finetune.optimizer.clip finetune.lora.alpha",
    ),
    (_POSITIVE, "seconds distributed.start_s distributed.heartbeat_s schedule.learning_rate schedule.clip loss_size"),
    (_SHARE, "hessian.correction finetune.optimizer.warmup finetune.optimizer.final schedule.final_share"),
    (_PART, "data.split"),
    (_COUNT, "model.max_positions"),
    (_DECAY, "finetune.optimizer.b1 finetune.optimizer.b2"),
]
LIMITS: Mapping[str, _Limit] = {name: limit for limit, names in _BY_LIMIT for name in names.split()}
