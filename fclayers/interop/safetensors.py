"""Parameter trees in safetensors files."""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fclayers._util.checks import is_array
from fclayers._util.errors import BadType, BadValue, public
from fclayers._util.files import write_file
from fclayers._util.trees import path_name
from fclayers.interop._layers import check_entries


@public
def save_safetensors(path: str | os.PathLike[str], params: Any) -> None:
    """Writes the arrays of a pytree to a safetensors file.

    The file is written atomically.

    Args:
        path: The file. Its folder must exist; an existing file is replaced.
        params: Any pytree of arrays. An array's name is its path with dots, such as
            `classifier.0.weight`.

    Raises:
        ModuleNotFoundError: The `safetensors` package is missing.
        TypeError: A leaf is not an array, or of a dtype that the format does not have.
        ValueError: Two arrays have the same name.
        OSError: The file cannot be written. An existing file is not modified.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import jax
        >>> import fclayers as fc
        >>> mlp = fc.init_mlp(jax.random.key(0), [64, 128, 10])
        >>> path = Path(tempfile.mkdtemp(), "mlp.safetensors")
        >>> fc.interop.save_safetensors(path, mlp)
        >>> sorted(fc.interop.load_safetensors(path))
        ['0.bias', '0.weight', '1.bias', '1.weight']
        >>> fc.interop.load_safetensors(path, mlp)[0].weight.shape
        (64, 128)

    Source: the `safetensors format <https://huggingface.co/docs/safetensors/index>`_.
    """
    from safetensors.numpy import save

    arrays = {entry: np.asarray(leaf, order="C") for entry, leaf in _named(params).items()}
    for entry, array in arrays.items():
        if str(array.dtype) not in _DTYPES.values():
            raise BadType(f"{entry} has dtype {array.dtype}, which safetensors lacks")
    write_file(Path(path), save(arrays))


@public
def load_safetensors(path: str | os.PathLike[str], like: Any = None) -> Any:
    """Reads a safetensors file, written by this library or any other program.

    Args:
        path: The file.
        like: A pytree of arrays, or of the `jax.ShapeDtypeStruct` leaves that `jax.eval_shape`
            returns, with the structure that was saved. Default: a flat dict.

    Returns:
        With `like`, its structure with JAX arrays of the same shapes and dtypes. Without, a dict
        from names to NumPy arrays, which is also what `from_torch` takes.

    Raises:
        ModuleNotFoundError: The `safetensors` package is missing.
        OSError: The file cannot be read.
        ValueError: The file is truncated or not a safetensors file, or entries are missing, extra,
            or of another shape or dtype than in `like`; the message names all of them.

    Example: see `save_safetensors`.
    """
    arrays = _read(Path(path))
    if like is None:
        return arrays
    expected = _named(like)
    check_entries(arrays, expected, dtypes=True, source=f"{path}: ")
    leaves = [jnp.array(arrays[entry]) for entry in expected]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


# The format's dtypes with whole bytes, by their NumPy and JAX names.
_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "U16": "uint16",
    "U32": "uint32",
    "U64": "uint64",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}


def _named(params: Any) -> dict[str, Any]:
    named: dict[str, Any] = {}
    for path, leaf in jax.tree.leaves_with_path(params):
        entry = path_name(path)
        if isinstance(leaf, (bool, int, float, complex)):
            leaf = np.asarray(leaf, jax.dtypes.result_type(leaf))
        if not is_array(leaf):
            raise BadType(f"{entry} is of type {type(leaf).__name__}, not an array")
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            raise BadType(f"{entry} is a random key; save jax.random.key_data of it")
        if entry in named:
            raise BadValue(f"two arrays have the name {entry}")
        named[entry] = leaf
    return named


def _read(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, deserialize

    data = path.read_bytes()
    arrays: dict[str, np.ndarray] = {}
    try:
        for entry, tensor in deserialize(data):  # type: ignore[no-untyped-call]
            dtype = jnp.dtype(_DTYPES[tensor["dtype"]])
            arrays[entry] = np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
    except KeyError as error:
        raise BadValue(f"{path}: {entry} has the unknown dtype {error}") from error
    except (SafetensorError, ValueError) as error:
        raise BadValue(f"{path} is not a valid safetensors file: {error}") from error
    return arrays
