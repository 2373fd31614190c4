"""Fetching the official CIFAR-10 archive: checked, unpacked safely, and whole or not there."""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path, PurePosixPath
from typing import IO

from torchtower.training.errors import BadInput

CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR10_FOLDER = "cifar-10-batches-bin"

_CHUNK_BYTES = 1 << 20
_TIMEOUT_S = 30.0


def cache_folder() -> Path:
    """Return where data sets are kept between runs: `$XDG_CACHE_HOME/torchtower` or the like."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "torchtower"


def fetch_cifar10() -> Path:
    """Return the folder of the official binary layout, downloaded when it is not there yet."""
    return fetch_archive(CIFAR10_URL, CIFAR10_MD5, CIFAR10_FOLDER, cache_folder())


def fetch_archive(url: str, md5: str, member: str, folder: Path) -> Path:
    """Download and unpack an archive, unless that was done before.

    Args:
        url: A gzipped tar file.
        md5: Its checksum in hexadecimal digits.
        member: The folder in the archive that is wanted.
        folder: Where `member` is put; made if need be.

    Returns:
        `folder / member`, which exists either whole or not at all.

    Raises:
        BadInput: There is no network, the download was cut short, the checksum is another, or the
            folder cannot be written to.
    """
    target = folder / member
    if target.is_dir():
        return target
    print(f"downloading {url} to {target}", file=sys.stderr)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # In the folder itself, so that the last step is a rename within one file system.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as scratch:
            with tempfile.TemporaryFile(dir=scratch) as archive:
                _download(url, md5, archive)
                with tarfile.open(fileobj=archive, mode="r:gz") as tar:
                    _unpack(tar, Path(scratch) / member)
            _move(Path(scratch) / member, target)
    except (OSError, http.client.HTTPException, tarfile.TarError, EOFError) as error:
        raise BadInput(
            f"expected to download {url} to {folder}, but got: {error}. Without a network, put the "
            f"files of {member} into a folder and name it with --data"
        ) from error
    return target


def _download(url: str, md5: str, archive: IO[bytes]) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:
        while chunk := response.read(_CHUNK_BYTES):
            digest.update(chunk)
            archive.write(chunk)
    if digest.hexdigest() != md5:
        raise BadInput(
            f"expected {url} to have the MD5 checksum {md5}, but got {digest.hexdigest()} "
            f"in {archive.tell()} bytes: cut short or changed; nothing was kept"
        )
    archive.seek(0)


def _unpack(tar: tarfile.TarFile, folder: Path) -> None:
    """Write the plain files that lie right in the archive's folder of that name, and no other.

    Nothing else of an archive can land anywhere: `TarFile.extractall` is as safe only with a
    `filter`, which Python has from 3.11.4.
    """
    for entry in tar:
        path = PurePosixPath(entry.name)
        if entry.isreg() and path.parent == PurePosixPath(folder.name):
            folder.mkdir(exist_ok=True)
            content = tar.extractfile(entry)
            assert content is not None  # As of every plain file.
            with content, open(folder / path.name, "wb") as file:
                shutil.copyfileobj(content, file)


def _move(unpacked: Path, target: Path) -> None:
    if not unpacked.is_dir():
        raise BadInput(f"expected a folder '{target.name}' in the archive, but there is none")
    try:
        os.replace(unpacked, target)
    except OSError:
        # Another run may have been faster, with the same bytes.
        if not target.is_dir():
            raise
        shutil.rmtree(unpacked)
