"""Files that are either whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Call `write(file)` on a temporary neighbour, fsync, rename: `path` is the old file or the whole new one."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the rename itself must reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def move_in(made: Path, folder: Path, last: str) -> None:
    """Copy the files of `made` into `folder`, each whole, the one called `last` last."""
    for path in sorted((p for p in made.rglob("*") if p.is_file()), key=lambda p: p.name == last):
        to, data = folder / path.relative_to(made), path.read_bytes()
        to.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(to, lambda file, data=data: file.write(data))  # type: ignore[misc]


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    text = json.dumps(value, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """`write_json` of `value` with the checksum that `read_sealed` looks at."""
    write_json(path, {**value, "sha256": _seal(value)})


def read_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote. Raises FileNotFoundError, or ValueError if a bit of it has changed."""
    try:
        value = json.loads(path.read_bytes())
        if value.pop("sha256") == _seal(value):
            return value
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{path} is damaged; delete that file and build again")


def _seal(value: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def packed(weights: dict[str, Any], kind: str, config: dict[str, Any]) -> bytes:
    """Tensors as safetensors, with `config` under the name `kind` in the header."""
    from safetensors.torch import save

    plain = {k: v.detach().contiguous().cpu() for k, v in weights.items()}
    return save(plain, metadata={kind: json.dumps(config)})  # one name alone: the order of several is random


def write_weights(path: Path, weights: dict[str, Any], kind: str, config: dict[str, Any]) -> None:
    """Write `packed` with the checksum that `read_weights` looks at in the header."""
    data = packed(weights, kind, {**config, "sha256": hashlib.sha256(packed(weights, kind, config)).hexdigest()})
    write_atomically(path, lambda file: file.write(data))


def read_weights(path: Path, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configuration and tensors of such a file. Raises ValueError where its checksum, which older files lack, differs."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        config = json.loads((file.metadata() or {})[kind])
        weights = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
    if not isinstance(config, dict):
        raise ValueError("its header has no configuration")
    known = config.pop("sha256", None)
    if known is not None and known != hashlib.sha256(packed(weights, kind, config)).hexdigest():
        raise ValueError("a checksum differs")
    return config, weights


@contextmanager
def explained(folder: Path) -> Iterator[None]:
    """An OSError says what it stopped, and that the same call goes on from there."""
    try:
        yield
    except OSError as error:
        why = f"cannot write in {folder} ({error.strerror or error}); what is finished is safe: mend that and run it again"
        raise OSError(error.errno, why) from error


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def intact(path: Path) -> bool:
    """Whether each part of a torch file, which is a zip, has the CRC that was written with it: torch.load does not look."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except FileNotFoundError:
        raise
    except Exception:  # what a damaged directory makes of zipfile is not one type
        return False
