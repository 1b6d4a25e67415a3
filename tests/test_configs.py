"""Every option of every configuration group composes and is accepted by the code it configures."""

import pathlib

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import experiments.quantize as entry_point
from qjax import codebooks, rounding
from qjax.codebooks.base import CODEBOOKS
from qjax.incoherence import INCOHERENCE

CONFIGS = pathlib.Path(entry_point.CONFIGS)
GROUPS = "codebook data evaluate experiment debug finetune hessian incoherence memory model recipe rounding scale"
GROUPS = [*GROUPS.split(), "tracker", "distributed"]
OPTIONS = [(group, file.stem) for group in GROUPS for file in sorted((CONFIGS / group).glob("*.yaml"))]
# What an option cannot do without: values the user must give, and partners that fit.
NEEDS = {
    ("model", "hf"): ["model.source=folder"],
    ("model", "gguf"): ["model.source=file.gguf"],
    ("data", "tokens"): ["data.path=tokens.npy"],
    ("scale", "minmax"): ["codebook=grid"],
    ("scale", "group"): ["codebook=grid"],
    ("codebook", "e81b"): ["bits=1"],
    ("finetune", "block"): ["hessian=original"],
    ("codebook", "e8p_rvq"): ["bits=4"],
}


def composed(*overrides):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("quantize", list(overrides))


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_option_builds_a_job(group, option, tmp_path):
    config = composed(f"{group}={option}", f"cache={tmp_path}", *NEEDS.get((group, option), []))
    task = entry_point.job_of(config)
    plans = task.recipe.plan(["layers.0.self_attn.q_proj"])
    assert plans["layers.0.self_attn.q_proj"] is not None


@pytest.mark.parametrize(
    ("group", "registry"),
    [("codebook", CODEBOOKS), ("rounding", rounding.ROUNDINGS), ("incoherence", INCOHERENCE)],
)
def test_everything_registered_can_be_chosen(group, registry):
    assert {file.stem for file in (CONFIGS / group).glob("*.yaml")} == set(registry)


def test_every_configuration_says_what_it_is():
    for file in CONFIGS.rglob("*.yaml"):
        lines = file.read_text().splitlines()
        assert any(line.startswith("# ") and "@package" not in line for line in lines[:3]), file


def test_make_takes_what_spec_gives():
    for name in CODEBOOKS:
        bits = {"e81b": 1, "e8p_rvq": 4}.get(name, 2)
        book = codebooks.make(name, bits)
        assert codebooks.make(**book.spec()).spec() == book.spec()
