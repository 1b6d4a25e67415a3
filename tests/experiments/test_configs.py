"""Every option of every configuration group composes and is accepted by the code it configures."""

import pathlib

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import experiments.quantize as entry_point
from qjax import codebooks, rounding
from qjax.codebooks.base import CODEBOOKS
from qjax.incoherence.families import INCOHERENCE

CONFIGS = pathlib.Path(entry_point.CONFIGS)
GROUPS = "codebook data evaluate experiment debug finetune hessian incoherence memory model recipe rounding scale"
GROUPS = [*GROUPS.split(), "tracker", "mesh", "distributed"]
OPTIONS = [(group, file.stem) for group in GROUPS for file in sorted((CONFIGS / group).glob("*.yaml"))]
METHODS = sorted(file.stem for file in (CONFIGS / "method").glob("*.yaml") if file.stem != "none")
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


def composed_with_hydra(*overrides):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("quantize", list(overrides), return_hydra_config=True)


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


def test_all_methods_are_swept():
    swept = composed_with_hydra("experiment=all_methods").hydra.sweeper.params
    methods = swept.method.split(",")
    assert sorted(methods) == METHODS
    assert methods[:8] == "rtn gptq ldlq quip quip_unscaled quip_sharp qtip yaqa".split() and swept.bits == "2,3,4"


@pytest.mark.parametrize("method", METHODS)
def test_a_row_of_all_methods(method, tmp_path):
    config = composed("experiment=all_methods", f"method={method}", f"cache={tmp_path}")
    assert config.recipe.name == method and config.hessian.stream == "original"  # names apart, Hessians shared
    assert (config.data.calibration_sequences, config.data.length) == (192, 256)  # the same tokens for every row
    for bits in (2, 3, 4):
        config.bits = bits
        assert entry_point.job_of(config).recipe.plan(["layers.0.mlp.up_proj"])["layers.0.mlp.up_proj"] is not None
