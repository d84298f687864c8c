"""Atomic writing of files."""

import os
import secrets
from pathlib import Path


def write_file(path: Path, data: bytes) -> None:
    """Writes a file atomically, under a temporary name at first."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with beside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
