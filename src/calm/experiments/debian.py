"""Debian packages as a source of data: fetched and unpacked once, without root and without installing them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from calm.errors import CalmError


class Package(NamedTuple):
    """An unpacked package.

    Attributes:
        name: Such as "libreoffice-l10n-cy".
        version: Debian's, or "unknown" if it was unpacked by hand.
        root: The folder that its files lie in, as they would below `/`.
    """

    name: str
    version: str
    root: Path


def package(name: str, folder: str | os.PathLike[str]) -> Package:
    """Unpack a package below `folder`, or find it there, unpacked by an earlier call or by hand.

    Args:
        name: of the binary package.
        folder: keeps what was fetched. A `NAME_*.deb` in it is taken instead of a download, and a folder `NAME` in it
            instead of both. Processes that share it wait for one another.

    Returns:
        Where it is, and its version.

    Raises:
        CalmError: If there is no such package, or if apt-get or dpkg-deb is missing or fails.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]+", name):
        raise CalmError(f"{name!r} cannot be the name of a Debian package: lower-case letters, digits, '.', '+', '-'")
    folder = Path(folder)
    root = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{name}.lock"):
        if not root.is_dir():
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                archive = _archive(name, folder, Path(scratch))
                unpacked = Path(scratch, "unpacked")
                _run(name, folder, "dpkg-deb", "-x", str(archive), str(unpacked))
                version = _run(name, folder, "dpkg-deb", "-f", str(archive), "Version")
                Path(unpacked, "VERSION").write_text(version, encoding="utf-8")
                os.replace(unpacked, root)
    noted = root / "VERSION"
    return Package(name, noted.read_text(encoding="utf-8").strip() if noted.exists() else "unknown", root)


def _archive(name: str, folder: Path, scratch: Path) -> Path:
    """The .deb, downloaded into `scratch` unless it lies in `folder`."""
    found = sorted(folder.glob(f"{name}_*.deb"))
    if not found:
        _run(name, folder, "apt-get", "download", name, cwd=scratch)
        found = sorted(scratch.glob(f"{name}_*.deb"))
    return found[-1].resolve()


def _run(name: str, folder: Path, *command: str, cwd: Path | None = None) -> str:
    by_hand = (
        f"put {name}_VERSION_all.deb into {str(folder)!r}, or its unpacked files into {str(folder / name)!r} "
        "(on any machine: ar x FILE.deb && tar xf data.tar.*)"
    )
    if not shutil.which(command[0]):
        raise CalmError(f"{command[0]} was not found, so {name} cannot be fetched here: {by_hand}")
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        said = " ".join(line for line in done.stderr.splitlines() if line.startswith(("E:", "dpkg"))) or done.stderr
        raise CalmError(
            f"{' '.join(command[:2])} failed for {name}: {said.strip()}. Check the name with `apt-cache search`, "
            f"bring apt's lists up to date (`apt-get update`), or {by_hand}"
        )
    return done.stdout.strip()
