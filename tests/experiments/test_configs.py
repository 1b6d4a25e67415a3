"""Every option of every configuration group composes and is accepted by the code it configures."""

import dataclasses
import importlib
import inspect
import pathlib

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import experiments._quantize as entry_point
from qjax import codebooks
from qjax.codebooks.base import CODEBOOKS
from qjax.configuration import former, groups
from qjax.data.corpus import SOURCES
from qjax.finetune import TUNINGS
from qjax.hessian.estimators import ESTIMATORS
from qjax.incoherence.families import INCOHERENCE
from qjax.registry import options_of, plain
from qjax.rounding import ROUNDINGS
from qjax.runtime.tracker import TRACKERS

CONFIGS = pathlib.Path(entry_point.CONFIGS)
REGISTRIES = {
    "codebook": CODEBOOKS,
    "rounding": ROUNDINGS,
    "incoherence": INCOHERENCE,
    "hessian": ESTIMATORS,
    "finetune": TUNINGS,
    "data": SOURCES,
    "tracker": TRACKERS,
}


def names(group):
    """The options of a group: what is registered, the plain one, and the files."""
    registered = [groups.PLAIN[group]] if group in groups.PLAIN else groups.GROUPS[group].names()
    return sorted({*registered, *(file.stem for file in (CONFIGS / group).glob("*.yaml"))})


OPTIONS = [(group, name) for group in groups.ENTRIES["quantize"].groups for name in names(group)]
FILES = [(group, file.stem) for group in ("experiment", "debug") for file in sorted((CONFIGS / group).glob("*.yaml"))]
# What an option cannot do without: values the user must give, and partners that fit.
NEEDS = {
    ("model", "hf"): ["model.source=folder"],
    ("model", "gguf"): ["model.source=file.gguf"],
    ("data", "tokens"): ["data.path=tokens.npy"],
    ("data", "hf"): ["data.protocol=c4"],
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


@pytest.mark.parametrize(("group", "option"), OPTIONS + FILES)
def test_option_builds_a_job(group, option, tmp_path):
    config = composed(f"{group}={option}", f"cache={tmp_path}", *NEEDS.get((group, option), []))
    task = entry_point.job_of(config)
    plans = task.recipe.plan(["layers.0.self_attn.q_proj"])
    assert plans["layers.0.self_attn.q_proj"] is not None


@pytest.mark.parametrize("group", REGISTRIES)
def test_everything_registered_can_be_chosen_with_its_own_defaults(group):
    """One truth: what the composed configuration has is what Python's constructor does without being told."""
    chosen = groups.GROUPS[group]
    for name, constructor in REGISTRIES[group].items():
        config = OmegaConf.to_container(composed(f"{group}={name}")[group])
        assert config[chosen.key] == name
        for option, parameter in inspect.signature(constructor).parameters.items():
            if option in chosen.given or parameter.kind is inspect.Parameter.VAR_KEYWORD:
                continue
            required = parameter.default is inspect.Parameter.empty
            default = "???" if required else default_of(constructor, parameter)
            assert config[option] == default, (group, name, option)


def default_of(constructor, parameter):
    """The default as a plain value; a field's factory is called."""
    if dataclasses.is_dataclass(constructor):
        field = next(one for one in dataclasses.fields(constructor) if one.name == parameter.name)
        if field.default_factory is not dataclasses.MISSING:
            return plain(field.default_factory())
    return plain(parameter.default)


@pytest.mark.parametrize("group", REGISTRIES)
def test_what_is_read_from_source_is_what_is_imported(group):
    registry = REGISTRIES[group]
    for name in registry:
        read, live = registry.options(name), options_of(registry[name])
        assert list(read) == list(live) and read.open == live.open
        for option in live:
            assert read[option].default == live[option].default, (group, name, option)
            assert same(read[option].kind, live[option].kind), (group, name, option)


def same(one, other):
    """Whether two kinds take the same values."""
    if one is None or other is None:
        return one is other
    if (one.types, one.choices, one.limits) != (other.types, other.choices, other.limits):
        return False
    if one.fields is None or other.fields is None:
        return one.fields is other.fields and same(one.elements, other.elements)
    return list(one.fields) == list(other.fields) and all(
        same(one.fields[key].kind, other.fields[key].kind) for key in one.fields
    )


@pytest.mark.parametrize("group", [name for name in groups.PLAIN if name != "preset"])
def test_a_group_of_one_dataclass_has_its_defaults(group):
    room, _, name = groups.GROUPS[group].shared.rpartition(".")
    constructor = getattr(importlib.import_module(room), name)
    assert groups.GROUPS[group].options("").defaults() == options_of(constructor).defaults()


@pytest.mark.parametrize("entry", groups.ENTRIES)
def test_an_entry_point_has_the_defaults_of_its_dataclass(entry):
    room, _, name = groups.ENTRIES[entry].options.rpartition(".")
    constructor = getattr(importlib.import_module(room), name)
    assert groups.options_of_entry(entry).defaults() == options_of(constructor).defaults()


def test_every_configuration_says_what_it_is():
    for file in CONFIGS.rglob("*.yaml"):
        lines = file.read_text().splitlines()
        assert any(line.startswith("# ") and "@package" not in line for line in lines[:3]), file


def test_make_takes_what_spec_gives():
    for name in CODEBOOKS:
        bits = {"e81b": 1, "e8p_rvq": 4}.get(name, 2)
        book = codebooks.make(name, bits)
        assert codebooks.make(**book.spec()).spec() == book.spec()


METHODS = "rtn gptq_original ldlq_plain quip_original quip_unscaled quip_sharp qtip_mul1 yaqa_mul1".split()
PRESETS = {file.stem for file in (CONFIGS / "preset").glob("*.yaml")}
PUBLISHED = {"gptq", "ldlq", "quip", "qtip", "yaqa"}  # with streams of their own: these would not share Hessians


def test_all_methods_are_swept():
    swept = composed_with_hydra("experiment=all_methods").hydra.sweeper.params
    presets = swept.preset.split(",")
    assert set(presets) == PRESETS - PUBLISHED
    assert presets[:8] == METHODS and swept.bits == "2,3,4"


@pytest.mark.parametrize("preset", sorted(PRESETS - PUBLISHED))
def test_a_row_of_all_methods(preset, tmp_path):
    config = composed("experiment=all_methods", f"preset={preset}", f"cache={tmp_path}")
    assert config.preset.name == preset and config.hessian.stream == "original"  # names apart, Hessians shared
    assert (config.data.calibration_sequences, config.data.length) == (192, 256)  # the same tokens for every row
    for bits in (2, 3, 4):
        config.bits = bits
        assert entry_point.job_of(config).recipe.plan(["layers.0.mlp.up_proj"])["layers.0.mlp.up_proj"] is not None


def test_former_keys_are_presets_now():
    with pytest.warns(FutureWarning, match="method=ldlq,rtn means preset=ldlq_plain,rtn"):
        assert former.renewed(["method=ldlq,rtn", "bits=2"]) == ["preset=ldlq_plain,rtn", "bits=2"]
    with pytest.warns(FutureWarning, match="recipe= is now preset="):
        assert former.renewed(["recipe=ldlq"]) == ["preset=ldlq"]
    assert set(former.METHODS.values()) <= PRESETS
