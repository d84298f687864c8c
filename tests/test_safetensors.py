"""safetensors: every tree comes back, and no file, however broken, does harm."""

import json
import os
import resource
import stat
import struct
from pathlib import Path
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fclayers as fc

DTYPES = [
    "bool",
    "int8",
    "uint32",
    "float16",
    "bfloat16",
    "float32",
    "complex64",
    "float8_e4m3fn",
    "float8_e5m2",
]


class Custom(NamedTuple):
    array: jax.Array
    nothing: None
    scale: float


@st.composite
def trees(draw):
    def array():
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        return jnp.array(rng.integers(0, 2, shape), draw(st.sampled_from(DTYPES)))

    return {
        "mlp": (fc.LinearParams(array(), array()), fc.LinearParams(array(), None)),
        "ω/list": [array(), Custom(array(), None, 0.5)],
        "numbered": {3: jnp.int32(7)},
    }


@given(trees())
def test_round_trip(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("trees") / "tree.safetensors"
    fc.interop.save_safetensors(path, tree)
    loaded = fc.interop.load_safetensors(path, tree)
    chex.assert_trees_all_equal(loaded, tree)
    assert isinstance(loaded["ω/list"][1], Custom)
    abstract = jax.eval_shape(lambda tree: tree, tree)
    chex.assert_trees_all_equal(fc.interop.load_safetensors(path, abstract), tree)
    flat = fc.interop.load_safetensors(path)
    assert set(flat) >= {"mlp.0.weight", "ω/list.1.array", "numbered.3"}
    assert all(type(array) is np.ndarray for array in flat.values())


def test_64_bits_are_kept_for_numpy(tmp_path):
    tree = {"a": np.arange(3, dtype=np.int64), "b": np.full(2, np.pi)}
    fc.interop.save_safetensors(tmp_path / "f", tree)
    chex.assert_trees_all_equal(fc.interop.load_safetensors(tmp_path / "f"), tree)
    assert fc.interop.load_safetensors(tmp_path / "f")["b"].dtype == np.float64


def test_the_bytes_are_the_formats(tmp_path):
    """An 8-byte little-endian length, a JSON header, the data; written out by hand."""
    header = {"b": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}
    encoded = json.dumps(header).encode()
    path = tmp_path / "by_hand"
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + b"\x80\x3f\x00\xc0")
    loaded = fc.interop.load_safetensors(path)["b"]
    assert loaded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(loaded.astype(np.float32), [1, -2])


def test_all_differences_from_like_are_named(tmp_path):
    path = tmp_path / "mlp"
    fc.interop.save_safetensors(path, {"a": jnp.ones(2), "b": jnp.ones(3), "c": jnp.ones(4)})
    like = {"b": jnp.ones(3, jnp.bfloat16), "c": jnp.ones((2, 2)), "d": jnp.ones(1)}
    message = (
        r"(?s)load_safetensors: .*mlp: nothing was loaded, because of\s+"
        r"missing: d of shape \(1,\) and dtype float32\s+"
        r"extra: a of shape \(2,\) and dtype float32\s+"
        r"b should be of shape \(3,\) and dtype bfloat16, is of shape \(3,\) and dtype float32\s+"
        r"c should be of shape \(2, 2\) and dtype float32, is of shape \(4,\) and dtype float32"
    )
    with pytest.raises(ValueError, match=message):
        fc.interop.load_safetensors(path, like)


def test_saving_replaces_whole_files_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "params"
    fc.interop.save_safetensors(path, {"a": jnp.ones(2)})
    before = path.read_bytes()

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        fc.interop.save_safetensors(path, {"a": jnp.zeros(2)})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["params"]


def test_a_saved_file_has_the_usual_permissions(tmp_path):
    fc.interop.save_safetensors(tmp_path / "params", {"a": jnp.ones(2)})
    (tmp_path / "other").touch()
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("params", "other")}
    assert len(modes) == 1


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        ({"a": "text"}, TypeError, "save_safetensors: a is of type str, not an array"),
        ({"a": jax.random.key(0)}, TypeError, r"a is a random key; save jax\.random\.key_data"),
        ({"a": np.ones(1, complex)}, TypeError, "a has dtype complex128, which safetensors lacks"),
        ({"a.b": np.ones(1), "a": {"b": np.ones(1)}}, ValueError, r"two arrays have the name a\.b"),
    ],
)
def test_trees_that_cannot_be_saved(tmp_path, tree, error, message):
    with pytest.raises(error, match=message):
        fc.interop.save_safetensors(tmp_path / "file", tree)
    assert not list(tmp_path.iterdir())


def header_of(tensor):
    encoded = json.dumps({"a": tensor}).encode()
    return struct.pack("<Q", len(encoded)) + encoded


BROKEN = {
    "empty": b"",
    "truncated length": b"\x10\x00",
    "absurd length": struct.pack("<Q", 2**63) + b"{}",
    "length over 100 MB": struct.pack("<Q", 2**30) + b"{}",
    "no JSON": struct.pack("<Q", 4) + b"\xff\xfe{}",
    "no data": header_of({"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}),
    "absurd shape": header_of({"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 8]}),
    "empty but absurd": header_of({"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}),
    "negative shape": header_of({"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]}),
    "unknown dtype": header_of({"dtype": "F7", "shape": [0], "data_offsets": [0, 0]}),
    "four bits": header_of({"dtype": "F4", "shape": [0], "data_offsets": [0, 0]}),
    "offsets the wrong way": header_of({"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}),
    "deeply nested": struct.pack("<Q", 2 * 10**5) + b"[" * 10**5 + b"]" * 10**5,
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused(tmp_path, name):
    path = tmp_path / "broken"
    path.write_bytes(BROKEN[name])
    with pytest.raises(ValueError, match=r"load_safetensors: .*broken"):
        fc.interop.load_safetensors(path)


@pytest.mark.slow
def test_ten_thousand_mutated_files(tmp_path):
    """Bytes changed, cut, doubled; digits of the header changed: the documented error or arrays."""
    rng = np.random.default_rng(0)
    path = tmp_path / "mutated"
    fc.interop.save_safetensors(path, fc.init_mlp(jax.random.key(0), [3, 4, 2], dtype=jnp.bfloat16))
    sound = path.read_bytes()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = sum(not loads_or_refuses(path, mutate(rng, sound)) for _ in range(10_000))
    assert 1_000 < refused < 9_999
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 64 * 1024


def mutate(rng, data):
    data = bytearray(data)
    header_end = 8 + struct.unpack("<Q", data[:8])[0]
    for _ in range(rng.integers(1, 4)):
        place, end = sorted(rng.integers(0, len(data) + 1, 2))
        match rng.integers(6):
            case 0:
                data[place:end] = rng.bytes(end - place)
            case 1:
                del data[place:end]
            case 2:
                data[place:place] = data[place:end]
            case 3:
                data[:8] = struct.pack("<Q", 1 << int(rng.integers(64)))
            case 4 | 5:
                digits = [i for i in range(8, min(header_end, len(data))) if 48 <= data[i] < 58]
                for i in rng.choice(digits, min(len(digits), 2), replace=False) if digits else ():
                    data[i] = rng.integers(48, 58)
    return bytes(data)


def loads_or_refuses(path: Path, data: bytes) -> bool:
    path.write_bytes(data)
    try:
        arrays = fc.interop.load_safetensors(path)
    except ValueError as error:
        assert str(error).startswith(f"load_safetensors: {path}")  # noqa: PT017
        return False
    assert sum(array.nbytes for array in arrays.values()) <= len(data)
    return True
