"""The program `qjax`: its commands, what it loads, and the refusal of a stranger's package of the same name."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

import qjax
from experiments import _program

ROOT = pathlib.Path(__file__).parent.parent.parent
PROGRAM = ROOT / "experiments" / "_program.py"
REMEDY = "pip uninstall qjax qjax-compression, then install this one again: pip install -e . in a clone of qjax"
# As the program is called, and as a module of a clone; both from another folder than the clone.
WAYS = {"program": [str(PROGRAM)], "module": ["-P", "-m", "experiments.quantize"]}


def python(*words, path=(ROOT,), cwd=None):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, check=False)


def installed(folder, name, version, files):
    """A distribution in a folder of modules, as pip leaves it: its metadata and the list of its files."""
    about = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (about / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    for file, text in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    return folder


@pytest.fixture
def stranger(tmp_path):
    """A folder of modules with a package `qjax` of another project, which must not even be imported."""
    return installed(tmp_path / "site", "qjax", "0.2.0", {"qjax/__init__.py": "raise RuntimeError('imported')\n"})


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_commands_are_listed_without_importing_anything(tmp_path, words):
    program = (
        "import runpy, sys; sys.argv = ['qjax', *sys.argv[2:]]; runpy.run_path(sys.orig_argv[3], run_name='__main__'); "
        "assert not {'qjax', 'jax', 'numpy', 'hydra', 'experiments'} & set(sys.modules)"
    )
    found = python("-c", program, str(PROGRAM), *words, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    listed = dict(re.findall(r"^  (\w+) +(.+)$", found.stdout, re.M))
    assert set(listed) == {file.stem for file in (ROOT / "experiments").glob("[!_]*.py")}
    assert listed["quantize"] == "Quantise a language model" and all(map(str.strip, listed.values()))


def test_the_version_says_where_it_lies(tmp_path):
    found = python(str(PROGRAM), "--version", cwd=tmp_path)
    assert found.stdout == f"qjax {qjax.__version__} (qjax-compression, {ROOT / 'qjax'})\n"


def test_an_unknown_command_names_the_nearest(tmp_path):
    found = python(str(PROGRAM), "quantise", "model=tiny", cwd=tmp_path)
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr.startswith("error: there is no command 'quantise'; did you mean quantize?; there is: bench, ")


@pytest.mark.parametrize("way", WAYS)
def test_a_stranger_in_front_is_refused_and_not_imported(tmp_path, stranger, way):
    found = python(*WAYS[way], "--help", path=(stranger, ROOT), cwd=tmp_path)
    file = stranger / "qjax" / "__init__.py"
    assert found.returncode == 2 and found.stdout == ""
    told = (
        f"error: {file} (installed by qjax 0.2.0) is another project's qjax, where that of qjax-compression should be; "
    )
    assert found.stderr == f"{told}{REMEDY}\n"


def test_a_stranger_whose_files_lie_among_ours_is_refused(tmp_path, stranger):
    """One site-packages holds both, and `qjax/__init__.py` happens to be ours: other files need not be."""
    ours = (ROOT / "qjax" / "__init__.py").read_text()
    installed(stranger, "qjax-compression", "0.2.0", {"qjax/__init__.py": ours, "qjax/experiments/quantize.py": ""})
    found = python(str(PROGRAM), "--help", path=(stranger,), cwd=tmp_path)
    assert found.returncode == 2
    told = f"error: {stranger / 'qjax'} holds the files of two distributions, qjax-compression and qjax 0.2.0, which "
    assert found.stderr == f"{told}overwrite each other; {REMEDY}\n"


def test_what_an_uninstalled_stranger_leaves_is_refused(tmp_path, stranger):
    (stranger / "qjax" / "__init__.py").unlink()  # pip took it away with the stranger's files
    found = python("-S", str(PROGRAM), "--help", path=(stranger,), cwd=tmp_path)
    assert found.returncode == 2 and "its qjax/__init__.py is missing" in found.stderr and REMEDY in found.stderr


def test_a_distribution_of_that_name_elsewhere_does_no_harm(tmp_path, stranger):
    assert python(str(PROGRAM), "--help", path=(ROOT, stranger), cwd=tmp_path).returncode == 0


def test_another_program_gets_an_import_error(tmp_path, stranger):
    found = python("-P", "-c", "import experiments", path=(stranger, ROOT), cwd=tmp_path)
    assert found.returncode == 1 and "\nImportError: " in found.stderr and REMEDY in found.stderr


def test_this_qjax_is_not_refused():
    assert _program.refusal() is None
    assert qjax.__distribution__ == _program.DISTRIBUTION


def test_modules_of_experiments_find_each_other_under_both_names():
    """An absolute import would find a user's own folder `experiments/`, or nothing, in an installation."""
    absolute = re.compile(r"^\s*(?:from|import) (?:experiments|configs)\b|_target_: (?:experiments|configs)\b", re.M)
    code = [*(ROOT / "experiments").glob("*.py"), *(ROOT / "qjax").rglob("*.py")]
    for file in [*code, *(ROOT / "configs").rglob("*.yaml")]:
        assert not absolute.search(file.read_text(encoding="utf-8")), file


@pytest.mark.slow
def test_the_commands_of_a_clone_have_both_names(tmp_path):
    for words in (["-m", "qjax.experiments.report"], [str(PROGRAM), "report"]):
        found = python(*words, "runs=nothing", cwd=tmp_path)
        assert (found.returncode, found.stdout) == (2, ""), found.stderr
        assert found.stderr.startswith("error: runs: nothing does not exist")
