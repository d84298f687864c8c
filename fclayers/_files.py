"""Files that are there as a whole or not at all."""

import os
import secrets
from pathlib import Path


def write_file(path: Path, data: bytes) -> None:
    """Writes a file beside its place and renames it, so that it is never half there."""
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
