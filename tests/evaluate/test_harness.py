"""The harness' tasks on `tiny`: its own arithmetic on a task of ours, and clear errors."""

import importlib.util
import json
import sys

import pytest

from experiments.evaluate import main
from qjax import models
from qjax.evaluate import harness

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs the extra `eval`")

DOCUMENTS = [
    {"question": "import", "choices": [" os\nimport sys", " zq zq zq"], "answer": 0},
    {"question": "for i in", "choices": [" (((((", " range(10):"], "answer": 1},
    {"question": "return", "choices": [" None", " qqqq qqqq"], "answer": 0},
]


@pytest.fixture
def task(tmp_path):
    """A task of multiple choice and one of whole texts, from a file on this machine."""
    data = tmp_path / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    folder = tmp_path / "tasks"
    folder.mkdir()
    source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
    (folder / "choice.yaml").write_text(
        f"task: qjax_choice\n{source}output_type: multiple_choice\ndoc_to_text: '{{{{question}}}}'\n"
        "target_delimiter: ''\ndoc_to_choice: '{{choices}}'\ndoc_to_target: '{{answer}}'\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    (folder / "texts.yaml").write_text(
        f"task: qjax_texts\n{source}output_type: loglikelihood_rolling\ndoc_to_text: ''\n"
        "doc_to_target: '{{question}}'\nmetric_list: [{metric: word_perplexity}]\n"
    )
    return folder


@needs_harness
def test_tasks_on_tiny(task, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out.json"
    arguments = [
        "artifact=null",
        "model={source: tiny}",
        "tasks=[qjax_choice,qjax_texts]",
        f"include={task}",
        f"out={out}",
    ]
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
    main()
    report = json.loads(out.read_text())["reference"]
    tiny = models.load("tiny")
    adapted = harness.HarnessModel(tiny)
    right = 0
    for document in DOCUMENTS:
        pairs = [(None, *adapted._encode_pair(document["question"], choice)) for choice in document["choices"]]
        values = [value for value, _ in adapted._loglikelihood_tokens(pairs)]
        right += values.index(max(values)) == document["answer"]
    assert report["qjax_choice"]["acc,none"] == pytest.approx(right / 3) and report["qjax_choice"]["documents"] == 3
    assert report["qjax_texts"]["word_perplexity,none"] > 1


@needs_harness
def test_requests_of_the_harness():
    class Request:
        def __init__(self, *args):
            self.args = args

    adapted = harness.HarnessModel(models.load("tiny"), batch=2)
    prompts = ["import os", "def main", "class A"]
    whole = adapted.generate_until([Request(p, {"max_gen_toks": 12, "until": []}) for p in prompts])
    assert len(whole) == 3 and all(isinstance(text, str) for text in whole)
    stop = whole[0][len(whole[0]) // 2]
    cut = adapted.generate_until([Request(prompts[0], {"max_gen_toks": 12, "until": [stop]})])[0]
    assert cut == whole[0].split(stop)[0]
    long = "x = 1\n" * 900  # longer than the model's positions
    short = adapted.loglikelihood_rolling([Request("import os"), Request(long)])
    assert short[1] < short[0] < 0
    single = adapted.loglikelihood([Request("", "import os")])[0][0]
    assert short[0] == pytest.approx(single, rel=1e-5)


@needs_harness
def test_errors_name_what_there_is(task):
    tiny = models.load("tiny")
    with pytest.raises(ValueError, match=r"tasks: nonsense_task; the harness has \d+ tasks"):
        harness.evaluate_tasks(tiny, ["nonsense_task"])
    with pytest.raises(ValueError, match="include: /nowhere is no folder"):
        harness.evaluate_tasks(tiny, ["x"], include="/nowhere")


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_errors_of_the_command(monkeypatch, capsys):
    assert "artifact=null needs tasks" in run(monkeypatch, capsys, "artifact=null")
    assert "say which dense model" in run(monkeypatch, capsys, "artifact=null", "tasks=[piqa]")
    if importlib.util.find_spec("lm_eval") is None:
        message = run(monkeypatch, capsys, "artifact=null", "model={source: tiny}", "tasks=[piqa]")
        assert "tasks needs lm-eval: pip install -e '.[eval]'" in message
