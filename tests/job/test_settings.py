"""A mistyped group, key or value is one message that lists what exists, in every entry point; never a traceback."""

import copy
import functools
import pathlib
import re
import sys

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import experiments._quantize as job
from experiments import bench, evaluate, export, finetune, generate, hessians, quantize, report, train_tiny
from experiments._entry import plain
from qjax.configuration import groups
from qjax.configuration.check import check
from qjax.errors import InputError, QjaxError
from qjax.registry.options import Kind

CONFIGS = pathlib.Path(job.CONFIGS)
MAINS = {
    "quantize": quantize.main,
    "hessians": hessians.main,
    "evaluate_artifact": evaluate.main,
    "generate": generate.main,
    "bench": bench.main,
    "finetune": finetune.main,
    "export": export.main,
    "report": report.main,
    "train_tiny": train_tiny.main,
}
GIVEN = {"artifact": "folder", "out": "folder/out"}  # what must be said
# Partners without which an option is no valid job.
PARTNERS = {
    ("scale", "minmax"): {"codebook": "grid"},
    ("scale", "group"): {"codebook": "grid"},
    ("finetune", "block"): {"hessian": "original"},
}
WIDTHS = {"e81b": 1, "e8p_rvq": 4}


@functools.cache
def base(entry):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return plain(compose(entry, given(entry)))


def options(entry, group):
    """The names of a group's options, those of files too."""
    chosen = groups.GROUPS[group]
    plain_one = [groups.PLAIN[group]] if group in groups.PLAIN else chosen.names()
    return sorted({*plain_one, *(file.stem for file in (CONFIGS / group).glob("*.yaml"))})


@functools.cache
def option(entry, group, name):
    """The settings of an option, what must be given filled in."""
    if (CONFIGS / group / f"{name}.yaml").is_file():
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            node = OmegaConf.to_container(compose(entry, [*given(entry), f"{group}={name}"])[group], resolve=True)
    else:
        node = groups.GROUPS[group].node(name)
    return {key: "given" if value == "???" else value for key, value in node.items()}


def given(entry):
    return [f"{key}={GIVEN[key]}" for key, one in groups.options_of_entry(entry).items() if one.default == "???"]


def own_groups(entry):
    """The groups whose options are values of their own, not presets of others."""
    return [name for name in groups.ENTRIES[entry].groups if name != "preset" and not groups.GROUPS[name].flat]


def leaves(node, path=()):
    for key, value in node.items():
        yield (*path, key), value
        if isinstance(value, dict) and key not in ("parts", "artifacts"):
            yield from leaves(value, (*path, key))


def wrong(value):
    """Values of another kind than `value` is of."""
    others = ["x", -1, 1.5, True, None, [[]], {"a": 1}, float("nan")]
    kinds = {type(value)} | ({int} if isinstance(value, float) else set())
    unlimited = value is None  # what may stand there is asked of the table, below
    return (
        [other for other in others if type(other) not in kinds or other != other]
        if not unlimited
        else [{"a": [1]}, [[]]]
    )


def changed(settings, path, value):
    settings = copy.deepcopy(settings)
    node = settings
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return settings


def starts(entry):
    """(settings, paths of what is changed) for the entry itself and for every option of its groups."""
    yield base(entry), [(key,) for key, value in base(entry).items() if not isinstance(value, dict)]
    for group in own_groups(entry):
        for name in options(entry, group):
            settings = {**base(entry), group: option(entry, group, name)}
            if entry == "quantize":
                for other, chosen in PARTNERS.get((group, name), {}).items():
                    settings[other] = option(entry, other, chosen)
                settings["bits"] = WIDTHS.get(name, 2) if group == "codebook" else 2
            yield settings, [path for path, _ in leaves({group: settings[group]})]


def at(settings, path):
    for key in path:
        settings = settings[key]
    return settings


def kind_at(settings, entry, path):
    """The kind of a setting; None for the one that names an option."""
    group = groups.GROUPS.get(path[0]) if path[0] in groups.ENTRIES[entry].groups else None
    if group is None:
        known = {**groups.options_of_entry(entry).known, **flat(settings, entry)}
        inner = path
    else:
        if len(path) == 1:
            return Kind(frozenset({dict}))
        if path[1] == group.key:
            return None
        known = group.options("" if group.key is None else settings[path[0]][group.key]).known
        inner = path[1:]
    kind = known[inner[0]].kind
    for key in inner[1:]:
        if kind.fields is None:
            return None
        kind = kind.fields[key].kind
    return kind


def flat(settings, entry):
    """The settings at the top level that come from the option of a flat group."""
    chosen = [groups.GROUPS[name] for name in groups.ENTRIES[entry].groups if groups.GROUPS[name].flat]
    return {key: option for group in chosen for key, option in group.options(settings[group.key]).items()}


@pytest.mark.parametrize("entry", MAINS)
def test_every_value_of_another_kind_is_refused(entry):
    cases = 0
    for settings, paths in starts(entry):
        check(settings, entry)  # what is right is accepted
        for path in paths:
            if path == ("bench",) or (kind := kind_at(settings, entry, path)) is None:
                continue
            assert kind.types, path  # everything has a kind
            for value in wrong(at(settings, path)):
                if kind.takes(value):
                    continue  # the option has two kinds
                with pytest.raises(InputError, match=re.escape(path[0])):
                    check(changed(settings, path, value), entry)
                cases += 1
    assert cases > 10


@pytest.mark.parametrize("entry", MAINS)
def test_every_misspelt_key_is_refused_with_the_keys_there_are(entry):
    for settings, paths in starts(entry):
        for path in paths:
            misspelt = (*path[:-1], path[-1] + "_")
            with pytest.raises(InputError, match=re.escape(f"no {misspelt[-1]!r}")) as info:
                check(changed(settings, misspelt, 1), entry)
            assert "did you mean" in str(info.value) and path[-1] in str(info.value)


def refusal(settings, *, build):
    """What is said against settings, or None; any other error than qjax's is a failure of the test."""
    try:
        check(settings, "quantize")
        if build:
            job.job_of(OmegaConf.create(settings)).recipe.plan(["layers.0.mlp.up_proj"])
    except QjaxError as error:
        return str(error)
    return None


def test_numbers_out_of_range_make_no_job():
    """Negative, zero and huge numbers in every option of `quantize`: refused by name, or a job with a plan."""
    accepted = []
    for settings, paths in starts("quantize"):
        for path in paths:
            value = at(settings, path)
            if isinstance(value, bool) or not (isinstance(value, int | float) or value is None):
                continue
            for number in (-1, 0, 10**6):
                message = refusal(
                    changed(settings, path, number), build=number <= 0 or path[0] in ("rounding", "codebook")
                )
                if message is None:
                    accepted += [".".join(path)] if number < 0 else []
                else:
                    assert path[-1] in message or path[0] in message, (path, number, message)
    assert accepted == []


def refused(monkeypatch, capsys, entry, *words):
    monkeypatch.setattr(sys, "argv", [entry, *words])
    with pytest.raises(SystemExit) as info:
        MAINS[entry]()
    printed = capsys.readouterr()
    assert info.value.code in (1, 2) and "Traceback" not in printed.err and "HYDRA_FULL_ERROR" not in printed.err
    return printed.out + printed.err


WORDS = {  # command line -> what the message says
    "quantize roundng=ldlq": "did you mean rounding?",
    "quantize rounding=ldlqq": "did you mean ldlq?",
    "quantize rounding.pases=3": "did you mean passes?",
    "quantize experiment=demoo": "demo",
    "quantize recipe.name=x": "there is no 'recipe' any more; it is preset= now",
    "quantize preset=ldql": "did you mean ldlq?",
    "quantize +nonsense=1": "there is no 'nonsense'",
    "quantize bits=two": "bits is 'two'; expected is a",
    "quantize 'seed=[1'": "seed=[1",
    "quantize -m seed=x,1 bits=2 sweep=a dry_run=true": "seed is 'x'; expected is a whole number",
    "hessians hessian=orignal": "original",
    "evaluate_artifact": "artifact",
    "evaluate_artifact artifact=a batch=x": "batch is 'x'",
    "bench bench=matrx": "matrix",
    "finetune artifact=a out=b finetune.tokens=-1": "finetune.tokens is -1",
    "report rums=a": "did you mean runs?",
    "report figure=maybe": "figure is 'maybe'; expected is true or false",
}


@pytest.mark.parametrize("line", WORDS)
def test_command_lines(line, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    entry, *words = line.replace("'", "").split()
    assert WORDS[line] in refused(monkeypatch, capsys, entry, *words)
