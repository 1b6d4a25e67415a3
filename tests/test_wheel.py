"""What `pip install .` installs, and that it is used from a folder that has its own `experiments/` and `configs/`."""

import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import zipfile

import pytest

import qjax

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    from hatchling.build import build_wheel

    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return zipfile.ZipFile(folder / build_wheel(str(folder)))


def files(folder, pattern):
    return {file.relative_to(ROOT).as_posix() for file in (ROOT / folder).rglob(pattern)}


def test_the_wheel_holds_two_packages_and_the_program(wheel):
    names = set(wheel.namelist())
    about = f"qjax_compression-{qjax.__version__}"
    assert {name.partition("/")[0] for name in names} == {
        "qjax",
        "pallas_kernels",
        f"{about}.dist-info",
        f"{about}.data",  # of which nothing lands among the modules:
    }
    assert {name for name in names if name.startswith(f"{about}.data")} == {f"{about}.data/scripts/qjax"}
    assert wheel.read(f"{about}.data/scripts/qjax").startswith(b"#!python\n")  # pip writes the interpreter's path there


def test_experiments_and_configs_travel_inside_qjax(wheel):
    names = set(wheel.namelist())
    inside = files("experiments", "*.py") | files("configs", "*.yaml")
    assert len(inside) > 80 and {f"qjax/{name}" for name in inside} <= names
    code = files("qjax", "*.py") | files("pallas_kernels", "*.py")
    data = {"pallas_kernels/tuned.json", "qjax/models/tiny/config.json", "qjax/models/tiny/tokenizer.json"}
    assert code | data <= names
    assert wheel.read("qjax/experiments/__init__.py") == (ROOT / "experiments" / "__init__.py").read_bytes()
    assert not [name for name in names if "test" in pathlib.PurePath(name).name.lower() or "__pycache__" in name]


def test_the_metadata_say_the_name_and_the_version_of_the_package(wheel):
    text = wheel.read(f"qjax_compression-{qjax.__version__}.dist-info/METADATA").decode()
    about = importlib.metadata.PathDistribution(zipfile.Path(wheel, f"qjax_compression-{qjax.__version__}.dist-info/"))
    assert about.metadata["Name"] == "qjax-compression" and about.version == qjax.__version__, text[:200]
    assert f"version: {qjax.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## [{qjax.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.fixture(scope="module")
def elsewhere(wheel, tmp_path_factory):
    """(environment, program, folder) of the unpacked wheel and of a user whose folder must not be looked into."""
    site, own = tmp_path_factory.mktemp("site"), tmp_path_factory.mktemp("own")
    wheel.extractall(site)
    for name in ("experiments", "configs"):
        (own / name).mkdir()
        (own / name / "__init__.py").write_text(f"raise RuntimeError('the {name} of the user')\n")
    for name in ("quantize", "report", "model/tiny"):
        file = own / "configs" / f"{name}.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text("junk: [\n")
    path = os.pathsep.join(map(str, (site, own)))  # for the program, on whose path the folder where it starts is not
    environment = {**os.environ, "PYTHONPATH": path, "QJAX_CACHE": str(own / "cache")}
    return environment, site / f"qjax_compression-{qjax.__version__}.data" / "scripts" / "qjax", own


def started(elsewhere, *words):
    environment, _, own = elsewhere
    return subprocess.run(
        [sys.executable, *map(str, words)], env=environment, cwd=own, capture_output=True, text=True, check=False
    )


def test_the_program_lists_its_commands(elsewhere):
    found = started(elsewhere, elsewhere[1])
    assert found.returncode == 0 and re.search("^  quantize +Quantise", found.stdout, re.M), found.stderr
    site = elsewhere[1].parent.parent.parent
    assert f"{site / 'qjax'})" in started(elsewhere, elsewhere[1], "--version").stdout


@pytest.mark.slow
@pytest.mark.parametrize("way", ["program", "module"])
def test_an_installation_plans_a_run(elsewhere, way):
    start = [elsewhere[1], "quantize"] if way == "program" else ["-m", "qjax.experiments.quantize"]
    found = started(elsewhere, *start, *"model=tiny dry_run=true out=run".split())
    assert found.returncode == 0 and "dry run: nothing was computed" in found.stdout, found.stderr


@pytest.mark.slow
def test_an_installation_sweeps(elsewhere):
    """The callback of configs/quantize.yaml is found, and the failed jobs are listed."""
    words = "-m model=gguf model.source=nowhere.gguf bits=2,3 sweep=s".split()
    found = started(elsewhere, elsewhere[1], "quantize", *words)
    assert found.returncode == 1 and "2 jobs: 0 finished, 2 failed, 0 not possible" in found.stdout, found.stderr
    assert (elsewhere[2] / "runs" / "s" / "jobs.jsonl").exists()
