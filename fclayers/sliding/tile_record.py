"""The file that records how many tiles of a run are finished."""

import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from fclayers._util.checks import describe
from fclayers._util.errors import BadValue
from fclayers._util.files import write_file

# What a run depends on, in words.
Run = dict[str, str]


def read_record(path: Path, run: Run, total: int) -> int:
    """The number of finished tiles of this run; writes a new record if there is none."""
    try:
        record = json.loads(path.read_bytes())
    except FileNotFoundError:
        write_record(path, run, 0)
        return 0
    except ValueError as error:
        raise BadValue(f"{path} is damaged, or no record of a run: {error}") from error
    match record:
        case {"finished": int(), **then} if then != run:
            changes = [
                f"{key} was {then.get(key)}, is {now}"
                for key, now in run.items()
                if then.get(key) != now
            ]
            raise BadValue("\n  ".join([f"{path} records another run:", *changes]))
        case {"finished": int(finished)} if 0 <= finished <= total:
            return finished
    raise BadValue(f"{path} is damaged, or no record of a run: it has {record!r:.200}")


def write_record(path: Path, run: Run, finished: int) -> None:
    write_file(path, json.dumps({"finished": finished, **run}).encode())


def digest(args: PyTree) -> str:
    """A hash of the structure and values of arguments."""
    sha = hashlib.sha256(str(jax.tree.structure(args)).encode())
    for leaf in jax.tree.leaves(args):
        if jnp.issubdtype(jax.dtypes.result_type(leaf), jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        sha.update(describe(np.asarray(leaf)).encode() + np.asarray(leaf).tobytes())
    return sha.hexdigest()
