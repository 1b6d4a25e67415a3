"""The documentation is what the code is: the config reference is up to date, links lead somewhere, commands compose."""

import pathlib
import re
import runpy
import shlex

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ENTRIES = {"evaluate": "evaluate_artifact"}  # whose configuration has another name


def commands():
    """Every `python -m experiments.…` of a page that has no placeholder, as (page, words)."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if page.name == "config-reference.md":
            continue
        found = re.findall(r"`(python -m experiments\.[^`]+)`", text)
        for block in re.findall(r"```console\n(.*?)```", text, re.S):
            found += [
                line for line in block.replace("\\\n", " ").splitlines() if line.startswith("python -m experiments.")
            ]
        for command in found:
            if "…" not in command and "[" not in command.split("'")[0] and "<" not in command:
                yield page.name, shlex.split(" ".join(command.split()), comments=True)


COMMANDS = list(commands())


@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=lambda value: value if isinstance(value, str) else value[2])
def test_command_composes(page, words):
    name = words[2].removeprefix("experiments.")
    overrides = [word for word in words[3:] if word not in ("-m", "--multirun", "--help")]
    if name == "bench" and overrides and "=" not in overrides[0]:
        overrides[0] = f"bench={overrides[0]}"
    # a sweep is composed with the first of its values
    overrides = [re.sub(r"=([^\[{'\"]*?),.*$", r"=\1", word) if "-m" in words else word for word in overrides]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        compose(ENTRIES.get(name, name), overrides)


def test_there_are_commands():
    assert len(COMMANDS) > 5


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in PAGES:
        named = set(re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(encoding="utf-8"), re.M))
        assert named <= targets, page.name


def test_the_config_reference_is_up_to_date():
    made = runpy.run_path(str(ROOT / "scripts" / "make_config_reference.py"))
    assert made["PAGE"].read_text(encoding="utf-8") == made["reference"](), "python scripts/make_config_reference.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target
