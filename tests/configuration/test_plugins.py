"""A user's own package takes part in everything: sweeps, the report, checks of options, defaults, the laws."""

import csv
import json
import os
import pathlib
import subprocess
import sys

import pytest

from qjax.configuration import plugins
from qjax.errors import InputError

PACKAGES = pathlib.Path(__file__).parents[1] / "fixtures" / "plugins"
ROOT = pathlib.Path(__file__).parents[2]
OWN = "rounding=own_ldlq codebook=own_powers hessian=own_moment data=own_numbers".split()
SMALL = "model=tiny bits=2 data.calibration_sequences=2 data.evaluation_sequences=2 data.length=32 tracker=none".split()


def run(*words, folder, packages=PACKAGES):
    """The status and the output of `python -m experiments.<words>` in a process of its own."""
    path = os.pathsep.join([str(packages), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "default"}
    command = [sys.executable, "-m", f"experiments.{words[0]}", *words[1:]]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_own_algorithms_in_a_sweep_and_in_its_report(tmp_path):
    words = [*OWN, *SMALL, "plugins=[own_methods]", f"cache={tmp_path}/cache", "sweep=own"]
    words += ["rounding.passes=0,1", "rules=[{pattern: '[kvo]_proj|mlp', skip: true}]"]
    status, said = run("quantize", "-m", *words, folder=tmp_path)
    assert status == 0 and "2 jobs: 2 finished" in said, said
    jobs = [json.loads((file.parent / "results.json").read_text()) for file in tmp_path.glob("runs/own/*/results.json")]
    assert len(jobs) == 2
    for job in jobs:
        chosen = job["settings"]
        assert (chosen["rounding"]["name"], chosen["codebook"]["name"]) == ("own_ldlq", "own_powers")
        assert (chosen["hessian"]["estimator"], chosen["hessian"]["power"]) == ("own_moment", 0.5)
        assert (chosen["data"]["source"], chosen["data"]["last"]) == ("own_numbers", 4000)
        assert job["kl_mean"] > 0
    status, said = run("report", "runs=runs/own", "out=report", "figure=false", folder=tmp_path)
    assert status == 0, said
    rows = list(csv.DictReader((tmp_path / "report" / "report.csv").read_text().splitlines()))
    assert len(rows) == 2 and all("own_ldlq" in row.values() and "own_powers" in row.values() for row in rows)


CASES = {
    "rounding=own_ldlq rounding.extra=2": "rounding.extra is 2; it is a share, 0 to 1",
    "rounding=own_ldlq rounding.pases=2": "did you mean passes?",
    "codebook=own_powers codebook.rms=x": "codebook.rms is 'x'; expected is a number or null",
    "hessian=own_moment hessian.power=-1": "hessian.power is -1; it is a share",
    "data=own_numbers data.last=0": "data.last is 0; it is a number of things",
    "rounding=own_ldql": "did you mean own_ldlq?",
}


@pytest.mark.slow
def test_options_of_own_algorithms_are_checked_as_all_others(tmp_path):
    """One process for all cases: each is a command line of its own."""
    script = (
        "import sys, io, contextlib\n"
        "from experiments.quantize import main\n"
        f"for line in {list(CASES)!r}:\n"
        "    sys.argv = ['quantize', *line.split(), 'plugins=[own_methods]']\n"
        "    out = io.StringIO()\n"
        "    with contextlib.redirect_stderr(out), contextlib.suppress(SystemExit):\n"
        "        main()\n"
        "    print(line, '->', out.getvalue().strip().replace(chr(10), ' '))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGES), str(ROOT)])}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    said = dict(line.split(" -> ", 1) for line in done.stdout.splitlines() if " -> " in line)
    assert set(said) == set(CASES), done.stdout + done.stderr
    for line, message in CASES.items():
        assert message in said[line], (line, said[line])


def test_the_modules_that_a_command_line_names(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "own.yaml").write_text("# @package _global_\nplugins: [in_the_file]\n")
    named = plugins.named(["+plugins=[a.b, c]", "experiment=own", "--config-dir", str(tmp_path), "bits=2"])
    assert named == ["a.b", "c", "in_the_file"]
    assert plugins.named(["plugins=one", "experiment=demo"]) == ["one"]


def test_a_module_that_is_not_there_is_named():
    with pytest.raises(InputError, match="plugins: 'no_such_package.own' cannot be imported: there is no module"):
        plugins.load(["no_such_package.own"])


def test_a_module_that_breaks_is_named_with_the_place(tmp_path, monkeypatch):
    (tmp_path / "broken_plugin.py").write_text("x = 1\nraise KeyError('of its own')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r"'broken_plugin' cannot be imported: KeyError: .*broken_plugin.py, line 2"):
        plugins.load("broken_plugin")


def test_an_installed_package_names_its_modules(tmp_path, monkeypatch):
    package = tmp_path / "own_installed-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: own-installed\nVersion: 1\n")
    (package / "entry_points.txt").write_text("[qjax.plugins]\nown = own_installed_module\n")
    (tmp_path / "own_installed_module.py").write_text("LOADED = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert plugins.load_installed() >= 1
    assert sys.modules["own_installed_module"].LOADED
    (package / "entry_points.txt").write_text("[qjax.plugins]\nown = gone_module\n")
    with pytest.raises(InputError, match=r"entry point 'own' \(gone_module\) of the package 'own-installed'"):
        plugins.load_installed()
