"""The documentation is what the code is: config reference, links, and commands, which run where that is cheap."""

import importlib
import pathlib
import re
import shlex
import sys

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from experiments._entry import CONFIGS
from qjax.configuration import groups
from qjax.configuration.reference import reference

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ENTRIES = {"evaluate": "evaluate_artifact"}  # whose configuration has another name


def commands():
    """Every `qjax …` and `python -m experiments.…` of a page without a placeholder, as (page, words of the latter)."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found = re.findall(r"`((?:python -m experiments\.|qjax [a-z])[^`]+)`", text)
        for block in re.findall(r"```console\n(.*?)```", text, re.S):
            found += [
                line
                for line in block.replace("\\\n", " ").splitlines()
                if line.startswith(("python -m experiments.", "qjax "))
            ]
        for command in (re.sub(r"^qjax ", "python -m experiments.", line) for line in found):
            if "…" not in command and "[" not in command.split("'")[0] and "<" not in command:
                yield page.name, shlex.split(" ".join(command.split()), comments=True)


COMMANDS = list(commands())


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda value: value if isinstance(value, str) else value[2])
def test_command_composes(page, words):
    name = words[2].removeprefix("experiments.")
    overrides = [word for word in words[3:] if word not in ("-m", "--multirun", "--help")]
    if name == "bench" and overrides and "=" not in overrides[0]:
        overrides[0] = f"bench={overrides[0]}"
    overrides = [word for word in overrides if not word.startswith(("hydra/", "hydra."))]  # of extras
    overrides = [re.sub(r"=interval\(([^,]*),.*\)$", r"=\1", word) for word in overrides]
    # a sweep is composed with the first of its values
    overrides = [re.sub(r"=([^\[{'\"]*?),.*$", r"=\1", word) if "-m" in words else word for word in overrides]
    GlobalHydra.instance().clear()
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        compose(ENTRIES.get(name, name), overrides)


# Commands that are run, in this order, in one folder, with what makes them cheap: later words win.
RUN = {
    "quantize model=tiny rounding=ldlq codebook=half_integer bits=2 out=runs/a": "debug=fast",
    "evaluate artifact=runs/a/artifact": "",
    "generate artifact=runs/a/artifact prompt=The function returns": "max_new_tokens=4",
    "generate artifact=runs/a/artifact prompt=The function returns max_new_tokens=64": "max_new_tokens=4",
    "generate model.source=tiny temperature=0.8 top_p=0.95 seed=1": "max_new_tokens=4",
    "quantize -m sweep=mine debug=fast rounding=nearest,gptq,ldlq bits=2,3,4": "rounding=nearest evaluate=none bits=2",
    "report runs=runs/mine out=runs/mine/report": "figure=false",
}
# Why the others are composed only.
COMPOSED = {
    r"^quantize .*experiment=": "minutes to hours on SmolLM2-135M; tests/experiments builds the job of each",
    r"^quantize -m sweep=mine rounding=": "the same without debug=fast",
    r"^report runs=runs/all_methods": "after that sweep",
    r"^bench": "minutes; tests/bench",
    r"^quantize .*hydra/": "needs the extra `sweep`; tests/experiments/test_launchers.py",
    r"^finetune": "minutes; tests/finetune",
    r"tasks=": "needs the extra `eval`",
    r"mesh(=all|\.(data|model)=)": "needs several devices or processes; tests/devices",
    r"chat=true": "tiny has no chat template; tests/models",
    r"--help": "Hydra's own",
    r"^hessians|^train_tiny": "minutes",
}


def spoken(words):
    return " ".join([words[2].removeprefix("experiments."), *words[3:]])


def test_every_command_is_run_or_there_is_a_reason():
    lines = {spoken(words) for _, words in COMMANDS}
    assert set(RUN) <= lines, set(RUN) - lines
    without = [line for line in lines - set(RUN) if not any(re.search(pattern, line) for pattern in COMPOSED)]
    assert without == [], without


@pytest.mark.slow
def test_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QJAX_CACHE", str(tmp_path / "cache"))
    found = {spoken(words): words for _, words in COMMANDS}
    for line, cheap in RUN.items():
        words = found[line]
        monkeypatch.setattr(sys, "argv", [words[2], *words[3:], *cheap.split()])
        importlib.import_module(words[2]).main()
        assert capsys.readouterr().out, line
    assert (tmp_path / "runs/a/artifact/model.json").exists() and (tmp_path / "runs/mine/report/report.html").exists()


def test_there_are_commands():
    assert len(COMMANDS) > 5


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        named = set(re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(encoding="utf-8"), re.M))
        assert named <= targets, page.name


def test_the_config_reference_describes_every_option():
    page = reference()
    for group in groups.GROUPS.values():
        for name in group.names() or [""]:
            options = group.options(name)
            for option in options.values():
                assert option.doc, (
                    f"{group.name}={name}: {option.name} has no description in its constructor's docstring"
                )
                assert f"| `{option.name}` |" in page
    for entry in groups.ENTRIES:
        assert all(option.doc for option in groups.options_of_entry(entry).values()), entry
    for file in (ROOT / "configs").rglob("*.yaml"):
        if file.parent != ROOT / "configs":
            assert f"### {file.parent.name}={file.stem}\n" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


# The distribution of that bare name is another project's; an extra of it cannot be meant otherwise.
BARE = re.compile(r"pip3? (?:install|download)(?:\s+-\S+)*\s+['\"]?qjax(?![\w./-])|\bqjax\[[a-z]")
TEXTS = {".py", ".ipynb", ".md", ".yaml", ".toml", ".txt", ".sh", ".cff", ""}


def test_no_text_tells_to_install_the_registrys_qjax():
    folders = "qjax experiments pallas_kernels configs constraints docs findings notebooks scripts tests .ci".split()
    files = [*ROOT.glob("*"), *(file for folder in folders for file in (ROOT / folder).rglob("*"))]
    files = [file for file in files if file.is_file() and file.suffix in TEXTS and "__pycache__" not in file.parts]
    assert len(files) > 500
    for file in files:
        assert not BARE.search(file.read_text(encoding="utf-8", errors="replace")), file


@pytest.mark.parametrize("words", ["{}", "'{}[hf]'", "-U {}", '"{}[plots,hf]" -q', "{}==0.1"])
def test_such_a_text_is_found(words):
    assert BARE.search("first `pip install " + words.format("qjax") + "`, then")


@pytest.mark.parametrize("words", ["-e '.[hf]'", "{}-compression", "-e . in a clone of {}", ". && import {}"])
def test_other_install_commands_are_not(words):
    assert not BARE.search("pip install " + words.format("qjax"))
