"""Tasks of EleutherAI's lm-evaluation-harness on a model of qjax, quantised or dense: the extra `eval`."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from qjax.errors import InputError, missing_extra
from qjax.evaluate.continuations import continuations
from qjax.models import Model
from qjax.models.generate import generate_batch
from qjax.models.sampling import Sampling
from qjax.models.tokenizers.chat import chat_prompt, stop_ids

_TemplateLM: Any
try:
    from lm_eval.api.model import TemplateLM as _TemplateLM  # pyright: ignore[reportMissingImports]
except ImportError:
    _TemplateLM = object

__all__ = ["HarnessModel", "evaluate_tasks"]

_MOST_NEW_TOKENS = 256  # what the harness' own models generate unless a task says otherwise


class HarnessModel(_TemplateLM):
    """A `Model` behind the interface of the harness.

    Attributes:
      model: with the parameters to evaluate.
      batch: texts that run together.
      chat_options: further variables for the model's chat template.
    """

    def __init__(self, model: Model, batch: int = 8, chat_options: Mapping[str, Any] | None = None):
        """Raises InputError where lm-eval is not installed, or the model has neither BOS nor EOS."""
        if _TemplateLM is object:
            raise InputError(f"tasks {missing_extra('eval', 'lm-eval')}")
        super().__init__()
        if model.tokenizer.bos_id is None and model.tokenizer.eos_id is None:
            raise InputError(f"{model.name}: its tokenizer has neither BOS nor EOS, and tasks need a first token")
        self.model, self.batch, self.chat_options = model, batch, chat_options

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        tokenizer = self.model.tokenizer
        return tokenizer.bos_id if tokenizer.eos_id is None else tokenizer.eos_id  # pyright: ignore[reportReturnType]

    @property
    def prefix_token_id(self) -> int:
        """The id before a text without context."""
        return self.eot_token_id if self.model.tokenizer.bos_id is None else self.model.tokenizer.bos_id

    @property
    def max_length(self) -> int:
        """Positions of the model."""
        return self.model.config.max_positions

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's fingerprint."""
        return self.model.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Ids of a text, with BOS before it where the model expects one."""
        ids = self.model.tokenizer.encode(string).tolist()
        bos, wanted = self.model.tokenizer.bos_id, self.model.tokenizer.adds_bos and add_special_tokens is not False
        return [bos, *ids] if wanted and bos is not None and ids[:1] != [bos] else ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as a prompt. Raises as `chat_prompt`."""
        if not add_generation_prompt:
            raise InputError("tasks: an assistant's message to be continued is not supported; use chat=false")
        return chat_prompt(chat_history, self.model.tokenizer, self.chat_options)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        found = continuations(self.model.params, self.model.config, pairs, self.batch)
        for (key, _, _), answer in zip(requests, found, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """`log q(text)` of whole texts, in windows that each predict as many tokens as the model has positions."""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]

        windows, owner = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for pair in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length - 1, 1):
                windows.append(make_disjoint_window(pair))
                owner.append(number)
        totals = [0.0] * len(requests)
        for number, (value, _) in zip(
            owner, continuations(self.model.params, self.model.config, windows, self.batch), strict=True
        ):
            totals[number] += value
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to the first of a task's stop texts; a prompt too long for the model loses its beginning."""
        answers = [""] * len(requests)
        groups: dict[tuple[int, Sampling], list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(_how(request.args[1]), []).append(index)
        tokenizer = self.model.tokenizer
        for (count, sampling), members in groups.items():
            count = min(count, self.max_length - 1)
            for start in range(0, len(members), self.batch):
                part = members[start : start + self.batch]
                prompts = [self.tok_encode(requests[i].args[0])[-(self.max_length - count) :] for i in part]
                generated = generate_batch(
                    self.model.params,
                    self.model.config,
                    prompts,
                    count,
                    sampling=sampling,
                    eos_id=stop_ids(tokenizer) or self.eot_token_id,
                )
                for index, ids in zip(part, generated.tokens, strict=True):
                    answers[index] = _cut(tokenizer.decode(ids), requests[index].args[1].get("until"))
        return answers


def _how(options: Mapping[str, Any]) -> tuple[int, Sampling]:
    """(most new tokens, sampling) of a task's generation options."""
    temperature = float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0
    top_k = options.get("top_k") or None
    sampling = Sampling(temperature, top_k, float(options.get("top_p", 1.0)))
    return int(options.get("max_gen_toks", _MOST_NEW_TOKENS)), sampling


def _cut(text: str, until: Any) -> str:
    for stop in [until] if isinstance(until, str) else until or []:
        if stop:
            text = text.split(stop)[0]
    return text


def evaluate_tasks(
    model: Model,
    tasks: Sequence[str],
    *,
    fewshot: int | None = None,
    limit: int | None = None,
    include: str | None = None,
    batch: int = 8,
    chat: bool = False,
    chat_options: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Metrics by task, as the harness names them ("acc,none", "acc_stderr,none", …), and the number of its documents.

    Args:
      fewshot: examples before a question; None is what the task says.
      limit: documents of every task; None is all.
      include: a folder with further tasks.
      chat: write questions by the model's chat template, with `chat_options` as further variables for it.
      seed: of few-shot examples and bootstraps.

    Raises InputError where lm-eval is not installed, for an unknown task, a folder that is not there, or no tasks.
    """
    adapted = HarnessModel(model, batch, chat_options)
    from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
    from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

    if include is not None and not pathlib.Path(include).is_dir():
        raise InputError(f"include: {include} is no folder; give one with task definitions (*.yaml), or null")
    manager = TaskManager(include_path=include)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown or not tasks:
        raise InputError(
            f"tasks: {', '.join(unknown) or 'the list is empty'}; the harness has {len(manager.all_tasks)} tasks, "
            "listed by: lm_eval --tasks list; own ones with include=<folder>"
        )
    found = simple_evaluate(
        adapted,
        tasks=list(tasks),
        num_fewshot=fewshot,
        limit=limit,
        task_manager=manager,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed,
        fewshot_random_seed=seed,
    )
    assert found is not None  # only other processes than the first get None
    counts = found.get("n-samples", {})
    return {
        name: {**{k: v for k, v in metrics.items() if k != "alias"}, "documents": counts.get(name, {}).get("effective")}
        for name, metrics in found["results"].items()
    }
