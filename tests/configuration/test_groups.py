"""What is registered is a group's option at once, with its defaults and the checks of its types."""

import dataclasses
import pathlib
import subprocess
import sys
from typing import ClassVar

import pytest

from qjax.configuration import groups
from qjax.configuration.check import Mistyped, check
from qjax.finetune import TUNINGS, EndToEnd, RateRule, method_of
from qjax.registry import Options, Registry, Share, options_of
from qjax.registry.source import Unreadable, found_in, options_at

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def norms_only(monkeypatch):
    """A tuning method as a user adds it: one class, one line."""
    monkeypatch.setattr(TUNINGS, "_table", dict(TUNINGS._table))

    @TUNINGS.register("norms_only")
    @dataclasses.dataclass(frozen=True)
    class NormsOnly(EndToEnd):
        """End-to-end tuning of norms alone.

        Attributes:
          strength: of the rates.
        """

        name: ClassVar[str] = "norms_only"
        rules: tuple[RateRule, ...] = (RateRule("norm", 1e-3), RateRule(".", None))
        strength: Share = 1.0

    return NormsOnly


def test_a_tuning_method_is_one_class(norms_only):
    group = groups.GROUPS["finetune"]
    assert "norms_only" in group.names() and group.options("norms_only")["strength"].doc == "of the rates."
    assert group.options("norms_only")["topk"].doc.startswith("likeliest tokens")  # of the base
    node = group.node("norms_only")
    assert node["rules"] == [{"pattern": "norm", "rate": 1e-3}, {"pattern": ".", "rate": None}]
    assert (node["tokens"], node["optimizer"]["b2"], node["strength"]) == (131072, 0.99, 1.0)
    settings = {"mesh": {"data": 1, "model": 1}, "distributed": groups.GROUPS["distributed"].node("none")}
    settings |= {**groups.options_of_entry("finetune").defaults(), "artifact": "a", "out": "b", "finetune": node}
    check(settings, "finetune")
    made = method_of(node)
    assert made == norms_only() and made.rules[0] == RateRule("norm", 1e-3)
    for changed, message in [
        ({"strength": 2}, "finetune.strength is 2; it is a share"),
        ({"optimizer": {**node["optimizer"], "b1": 1.0}}, "finetune.optimizer.b1 is 1.0; it is at least 0 and less"),
        ({"optimizer": {**node["optimizer"], "clips": 1}}, "no 'clips' in finetune.optimizer; did you mean clip"),
        ({"loss": "mse"}, "finetune.loss is 'mse'; allowed are: kl, next_token"),
        ({"rules": "norm"}, "finetune.rules is 'norm'; expected is a list"),
    ]:
        with pytest.raises(Mistyped, match=message):
            check({**settings, "finetune": {**node, **changed}}, "finetune")


def test_reading_names_imports_nothing():
    """A registry's names come from the files of its room; a file is imported when its name is asked for."""
    before = set(sys.modules)
    registry = Registry("tuning method", "qjax.finetune.TUNINGS_OF_NOBODY")
    assert list(registry) == [] and set(sys.modules) == before
    assert set(found_in("qjax.finetune", "TUNINGS")) == {"block", "e2e", "lora", "pv", "qat"}


def test_a_default_that_must_be_computed_is_not_read():
    with pytest.raises(Unreadable, match="not defined"):
        options_at("qjax.finetune.e2e", "NoSuchClass")
    with pytest.raises(Unreadable):
        options_at("qjax.runtime.progress", "no_such_function")


def test_options_of_a_constructor_with_its_own_annotations():
    def made(size: int, *, scale: float | None = None, names: list[str] | str = "a", **others):
        """Something.

        Args:
          size: how large.
          scale: how far,
            in two lines.
        """

    options = options_of(made)
    assert isinstance(options, Options) and options.open and list(options) == ["size", "scale", "names"]
    assert options["size"].default == "???" and options["size"].doc == "how large."
    assert options["scale"].kind.words() == "a number or null" and options["scale"].doc == "how far, in two lines."
    assert options["names"].kind.takes(["x"]) and options["names"].kind.takes("x")
    assert options["names"].kind.refusal("names", [1]) == "names is [1]; expected is a list, each text"
    assert options["scale"].kind.refusal("scale", float("nan")) == "scale is nan; expected is a number or null"


def test_a_typing_error_is_answered_before_jax_is_imported():
    """A misspelt group, name, option and value, in a process of its own."""
    script = (
        "import sys\n"
        "from experiments.quantize import main\n"
        "for word in 'roundng=ldlq', 'rounding=ldql', 'rounding.pases=1', 'rounding.passes=-1', 'bits=two':\n"
        "    sys.argv = ['quantize', word]\n"
        "    try:\n"
        "        main()\n"
        "    except SystemExit as end:\n"
        "        print(end.code, sorted({'jax', 'numpy', 'flax', 'tokenizers'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines() == ["2 []"] * 5, done.stdout + done.stderr
