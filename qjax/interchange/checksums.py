"""The list of a folder's files with their SHA-256, verified before anything in it is parsed."""

from __future__ import annotations

import pathlib

from qjax.errors import ArtifactError
from qjax.models.checkpoints.files import sha256_file
from qjax.runtime.atomic import read_json, write_json
from qjax.runtime.fingerprint import digest

__all__ = ["CHECKSUMS", "seal", "verify"]

CHECKSUMS = "checksums.json"


def _files(path: pathlib.Path) -> list[str]:
    found = [file for file in path.rglob("*") if file.is_file() or file.is_symlink()]
    return sorted(str(file.relative_to(path)) for file in found if file != path / CHECKSUMS)


def seal(path: str | pathlib.Path) -> None:
    """Write `checksums.json`, the SHA-256 of every other file of a folder and of the list itself."""
    path = pathlib.Path(path)
    table = {name: sha256_file(path / name) for name in _files(path)}
    write_json(path / CHECKSUMS, {"files": table, "sha256": digest(table)})


def verify(path: pathlib.Path) -> None:
    """Compare every file with the list; ArtifactError names the first that is another, missing or surplus."""
    file = path / CHECKSUMS
    listed = read_json(file)
    table = listed.get("files") if isinstance(listed, dict) else None
    if not isinstance(table, dict) or digest(table) != listed.get("sha256"):
        raise ArtifactError(f"{file}: is damaged, it does not match its own checksum; run the quantisation again")
    if surplus := sorted(set(table) ^ set(_files(path))):
        raise ArtifactError(f"{path}: the files {surplus[:4]} are missing or surplus; run the quantisation again")
    for name, expected in table.items():
        try:
            found = sha256_file(path / name)
        except OSError as error:
            raise ArtifactError(f"{path / name}: cannot be read ({error.strerror}); check the disk") from error
        if found != expected:
            raise ArtifactError(
                f"{path / name}: damaged: its SHA-256 is {found}, recorded was {expected}; run the quantisation again"
            )
