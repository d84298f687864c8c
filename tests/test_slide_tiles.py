"""slide_tiles: what slide gives, from files larger than memory, and after any interruption."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fclayers as fc


def network(weight, x):
    """Several results of several dtypes, from pixels of which each counts differently."""
    y = jnp.tanh(x * weight)
    ramp = jnp.linspace(0, 1, y.size).reshape(y.shape)
    return {"mean": (y * ramp).mean(), "most": (y.argmax(), y.max())}


def make_out(sliding, *args):
    return jax.tree.map(lambda a: np.full(a.shape, 99, a.dtype), jax.eval_shape(sliding, *args))


def assert_close(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6 * np.abs(theirs).max())


@st.composite
def cases(draw):
    ndim = draw(st.integers(1, 3))

    def per_axis(least, greatest):
        return tuple(draw(st.integers(least, greatest)) for _ in range(ndim))

    window, stride, tile = per_axis(1, 4), per_axis(1, 3), per_axis(1, 4)
    axes = draw(st.permutations(range(ndim + 1)))[:ndim]
    shape = [2] * (ndim + 1)
    for axis, size, extra in zip(axes, window, per_axis(0, 12 // ndim), strict=True):
        shape[axis] = size + extra
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    image = rng.standard_normal(shape).astype(np.float32)
    axes = tuple(axis - draw(st.sampled_from([0, ndim + 1])) for axis in axes)
    return image, window, stride, axes, tile


@given(cases())
def test_tiles_give_what_slide_gives(case):
    image, window, stride, axes, tile = case
    sliding = fc.slide(network, window, stride=stride, axes=axes)
    out = make_out(sliding, 0.5, image)
    run = fc.slide_tiles(network, window, stride=stride, axes=axes, tile_shape=tile, progress=False)
    run(0.5, image, out)
    assert_close(out, jax.jit(sliding)(0.5, image))


@pytest.mark.slow
def test_padding_inside_means_the_window():
    params = fc.init_conv(jax.random.key(0), (3, 3), 1, 2)

    def fun(params, x):
        return fc.apply_conv(params, x, padding="SAME").sum((0, 1))

    image = np.random.default_rng(0).standard_normal((12, 13, 1)).astype(np.float32)
    out = np.zeros((8, 9, 2), np.float32)
    fc.slide_tiles(fun, (5, 5), tile_shape=(3, 3), progress=False)(params, image, out)
    assert_close(out, fc.slide(fun, (5, 5))(params, image))


def test_from_file_to_file(tmp_path):
    image = np.lib.format.open_memmap(tmp_path / "image.npy", "w+", np.uint8, (40, 50, 3))
    image[:] = np.random.default_rng(0).integers(0, 256, image.shape)
    out = np.lib.format.open_memmap(tmp_path / "out.npy", "w+", np.float32, (17, 22, 3))

    def fun(x):
        return x.mean((0, 1))

    image = np.load(tmp_path / "image.npy", mmap_mode="r")
    fc.slide_tiles(fun, (8, 7), stride=2, tile_shape=(5, 30), progress=False)(image, out)
    del out
    expected = fc.slide(fun, (8, 7), stride=2)(jnp.asarray(image))
    assert_close(np.load(tmp_path / "out.npy"), expected)


def test_a_file_of_the_other_byte_order():
    image = np.arange(12, dtype=">f4")
    out = np.zeros(10, np.float32)
    fc.slide_tiles(jnp.sum, (3,), progress=False)(image, out)
    np.testing.assert_array_equal(out, np.arange(10) * 3 + 3)


def test_the_function_is_compiled_once_whatever_does_not_divide():
    traces = []

    def fun(x):
        traces.append(x.shape)
        return x.sum()

    run = fc.slide_tiles(fun, (3, 3), stride=2, tile_shape=(4, 3), progress=False)
    for _ in range(2):
        run(np.ones((30, 29), np.float32), np.zeros((14, 14), np.float32))
    assert len(traces) <= 2  # once for the shapes of the results, once to compile


class Watched:
    """Counts what is read and written; fails after some writes."""

    def __init__(self, array, writes=np.inf):
        self.array, self.writes, self.largest, self.written, self.flushed = array, writes, 0, [], 0
        self.shape, self.dtype, self.reads = array.shape, array.dtype, 0

    def __getitem__(self, slices):
        part = self.array[slices]
        self.reads += 1
        self.largest = max(self.largest, part.nbytes)
        return part

    def __setitem__(self, slices, values):
        if len(self.written) >= self.writes:
            raise OSError("disk full")
        assert all(type(s) is slice for s in slices)
        self.array[slices] = values
        self.written.append(slices)

    def flush(self):
        self.flushed = len(self.written)


def test_memory_is_bounded_by_the_tile():
    image = Watched(np.random.default_rng(0).standard_normal((60, 70, 2)).astype(np.float32))
    out = np.zeros((29, 34), np.float32)
    fc.slide_tiles(jnp.sum, (4, 4), stride=2, tile_shape=(3, 5), progress=False)(image, out)
    assert image.largest == (2 * 2 + 4) * (4 * 2 + 4) * 2 * 4
    assert_close(out, fc.slide(jnp.sum, (4, 4), stride=2)(image.array))


@pytest.mark.parametrize("results", [1, 20])
def test_the_default_tile_is_at_most_64_mib(results):
    """Over an image of 4 GiB that takes no memory."""
    image = Watched(np.broadcast_to(np.float32(0.5), (32768, 32768)))
    seen = []

    class Enough(Exception):
        pass

    class Out:
        shape, dtype = (4096 - 1, 4096 - 1, results), np.dtype(np.float32)

        def __setitem__(self, slices, values):
            seen.append(values.nbytes)
            raise Enough

    def fun(x):
        return jnp.full(results, x.mean())

    with pytest.raises(Enough):
        fc.slide_tiles(fun, (16, 16), stride=8, progress=False)(image, Out())
    assert 2**23 < image.largest + seen[0] <= 2**26


def interrupt(tmp_path, after, **changes):
    """The record of a run over a 13×13 image of which `after` tiles were finished."""
    image = np.random.default_rng(0).standard_normal((15, 15)).astype(np.float32)
    settings = {"tile_shape": (4, 4), "progress": False, "resume": tmp_path / "run.json"}
    run = fc.slide_tiles(lambda weight, x: (weight * x).sum(), (3, 3), **settings | changes)
    array = np.zeros((13, 13), np.float32)
    with pytest.raises(OSError, match="disk full"):
        run(np.float32(2), image, Watched(array, after))
    return run, image, array


@pytest.mark.parametrize("after", [0, 1, 9, 15])
def test_a_run_resumes_where_it_stopped(tmp_path, after):
    run, image, array = interrupt(tmp_path, after)
    finished = array.copy()
    (tmp_path / ".run.json.12345678").write_text('{"fini')  # left by a process that was killed
    again, watched = Watched(array), Watched(image)
    run(np.float32(2), watched, again)
    assert watched.reads == len(again.written) == again.flushed == 16 - after
    assert_close(array, fc.slide(lambda x: (2 * x).sum(), (3, 3))(image))
    assert (array == finished).sum() >= 9 * after
    run(np.float32(2), image, again)
    assert len(again.written) == 16 - after
    assert {path.name for path in tmp_path.iterdir()} == {"run.json", ".run.json.12345678"}


def test_results_are_flushed_before_they_are_recorded(tmp_path):
    recorded = []

    class Out(Watched):
        def flush(self):
            recorded.append(json.loads((tmp_path / "run.json").read_text())["finished"])

    run = fc.slide_tiles(
        jnp.sum, (2,), tile_shape=(3,), resume=str(tmp_path / "run.json"), progress=False
    )
    run(np.ones(10, np.float32), Out(np.zeros(9, np.float32)))
    assert recorded == [0, 1, 2]


def test_an_unfinished_write_is_repeated(tmp_path):
    """Of two results the first was written, the second was not."""
    path, image = tmp_path / "run.json", np.arange(12, dtype=np.float32)
    run = fc.slide_tiles(
        lambda x: (x.sum(), x.max()), (3,), tile_shape=(4,), resume=path, progress=False
    )
    first, second = np.zeros(10, np.float32), np.zeros(10, np.float32)
    with pytest.raises(OSError, match="disk full"):
        run(image, (first, Watched(second, 1)))
    first[4:] = 99
    run(image, (first, second))
    assert_close((first, second), fc.slide(lambda x: (x.sum(), x.max()), (3,))(image))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_shape": (4, 3)}, "windows was .*3, 3.* is .*4, 3"),
        ({"stride": 2}, "1, 1.* pixels apart, is .*2, 2"),
        ({"axes": (1, 0)}, "axes"),
        ({"tile_shape": (5, 5)}, r"tile was \(4, 4\), is \(5, 5\)"),
        ({"weight": np.float32(3)}, "args was"),
        ({"image": np.zeros((16, 15), np.float32)}, "image was .*15, 15.* is .*16, 15"),
        ({"image": np.zeros((15, 15), np.int32)}, "image was .*float32, is .*int32"),
    ],
)
def test_the_record_of_another_run_is_refused(tmp_path, change, message):
    _, image, _ = interrupt(tmp_path, 3)
    before = (tmp_path / "run.json").read_bytes()
    given = {"window_shape": (3, 3), "tile_shape": (4, 4), **change}
    image, weight = given.pop("image", image), given.pop("weight", np.float32(2))

    def fun(weight, x):
        return (weight * x).sum()

    run = fc.slide_tiles(fun, **given, resume=tmp_path / "run.json", progress=False)
    sliding = fc.slide(fun, given["window_shape"], stride=given.get("stride", 1))
    out = Watched(make_out(sliding, weight, image))
    with pytest.raises(
        ValueError, match=rf"(?s)slide_tiles: .*run\.json records another run:\n.*{message}"
    ):
        run(weight, image, out)
    assert not out.written
    assert (tmp_path / "run.json").read_bytes() == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-7],
        lambda data: b"\xff\x00",
        lambda data: b"[]",
        lambda data: b"3",
        lambda data: b"{}",
        lambda data: json.dumps(json.loads(data) | {"finished": -1}).encode(),
        lambda data: json.dumps(json.loads(data) | {"finished": 17}).encode(),
        lambda data: json.dumps(json.loads(data) | {"finished": "3"}).encode(),
    ],
)
def test_a_damaged_record_is_refused(tmp_path, damage):
    run, image, array = interrupt(tmp_path, 3)
    record = tmp_path / "run.json"
    record.write_bytes(damage(record.read_bytes()))
    out = Watched(array)
    with pytest.raises(ValueError, match=r"slide_tiles: .*run\.json is damaged, or no record"):
        run(np.float32(2), image, out)
    assert not out.written


def test_a_record_that_cannot_be_written_stops_before_the_first_tile(tmp_path):
    run = fc.slide_tiles(jnp.sum, (2,), resume=tmp_path / "missing" / "run.json", progress=False)
    out = Watched(np.zeros(9, np.float32))
    with pytest.raises(FileNotFoundError):
        run(np.ones(10, np.float32), out)
    assert not out.written


def test_random_keys_and_trees_among_the_arguments(tmp_path):
    def fun(params, x):
        return x.sum() + jax.random.normal(params["key"]) * params["scale"]

    def run(seed):
        params = {"key": jax.random.key(seed), "scale": 2.0, "nothing": None}
        resume = tmp_path / "run.json"
        sliding = fc.slide_tiles(fun, (2,), tile_shape=(4,), resume=resume, progress=False)
        out = np.zeros(9, np.float32)
        sliding(params, np.ones(10, np.float32), out)
        return out, fc.slide(fun, (2,))(params, jnp.ones(10))

    assert_close(*run(0))
    with pytest.raises(ValueError, match="args was"):
        run(1)


IMAGE = np.zeros((8, 9), np.float32)
OUT = np.zeros((6, 7), np.float32)


@pytest.mark.parametrize(
    ("settings", "args", "error", "message"),
    [
        ({}, (), TypeError, r"\(\*args, image, out\), got 0 arguments"),
        ({}, (IMAGE,), TypeError, "got 1 arguments"),
        ({}, (3, OUT), TypeError, "the image to be an array, got 3"),
        ({}, (IMAGE[:2], OUT), ValueError, "does not fit into an image of shape"),
        ({}, (IMAGE[0], OUT), ValueError, "needs an image with 2 axes or more"),
        ({}, (IMAGE, OUT[1:]), ValueError, r"out should be .*\(6, 7\).*is .*\(5, 7\)"),
        ({}, (IMAGE, OUT.astype(int)), ValueError, r"should be .*float32, is .*int64"),
        ({}, (IMAGE, 3.0), ValueError, "out should be .*, is 3.0 of type float"),
        ({}, (IMAGE, (OUT, OUT)), ValueError, r"structure .*\*\).*, got .*\*, \*\)"),
        ({}, (IMAGE, None), ValueError, "structure"),
        ({"window_shape": (3, 0)}, (), ValueError, "window_shape must have entries >= 1"),
        ({"window_shape": 3}, (), ValueError, "window_shape must be a tuple .* got 3"),
        ({"stride": 0}, (), ValueError, "stride must be an integer >= 1 or 2.*, got 0"),
        ({"axes": (0, 2)}, (IMAGE, OUT), ValueError, "axis 2 is not an axis"),
        ({"axes": 0}, (IMAGE, OUT), ValueError, "axes must name 2 window axes"),
        ({"tile_shape": 4}, (), ValueError, "tile_shape must be a tuple of 2 integers >= 1.*got 4"),
        ({"tile_shape": (0, 2)}, (), ValueError, r"integers >= 1, one per.*got \(0, 2\)"),
        ({"tile_shape": (2,)}, (), ValueError, r"tile_shape .*got \(2,\)"),
        ({"tile_shape": (2, -1)}, (), ValueError, "tile_shape must be an integer >= 0, got -1"),
        ({"tile_shape": (2, 2.5)}, (), ValueError, "tile_shape must be an integer >= 0, got 2.5"),
    ],
)
def test_bad_input(settings, args, error, message):
    settings = {"window_shape": (3, 3), "progress": False} | settings
    with pytest.raises(error, match=rf"(?s)slide_tiles: .*{message}"):
        fc.slide_tiles(jnp.sum, **settings)(*args)


def test_everything_wrong_with_out_is_named():
    out = {"mean": OUT, "most": (OUT, OUT[:, 1:])}
    with pytest.raises(ValueError, match="nothing was computed") as caught:
        fc.slide_tiles(network, (3, 3), progress=False)(0.5, IMAGE, out)
    assert "out.most.0 should be an array of shape (6, 7) and dtype int32" in str(caught.value)
    assert "out.most.1 should be an array of shape (6, 7) and dtype float" in str(caught.value)
    assert "out.mean" not in str(caught.value)


def test_progress(tmp_path, capfd):
    run, image, array = interrupt(tmp_path, 3)
    assert capfd.readouterr() == ("", "")
    run, image, array = interrupt(tmp_path, 2, progress=True)
    assert "3/16" in capfd.readouterr().err
    run(np.float32(2), image, array)
    out, err = capfd.readouterr()
    assert out == ""
    assert "5/16" in err
    assert "16/16" in err
    assert "tile" in err


def test_without_tqdm_there_is_no_bar_and_no_error(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    out = np.zeros_like(OUT)
    fc.slide_tiles(jnp.sum, (3, 3))(IMAGE + 1, out)
    assert (out == 9).all()
    assert capfd.readouterr() == ("", "")
