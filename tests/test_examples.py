"""The examples run, and do what they say."""

import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_digits(tmp_path, capfd):
    picture = tmp_path / "new" / "digits.png"
    accuracy = runpy.run_path(str(EXAMPLES / "digits.py"))["main"](
        ["--epochs", "40", "--output", str(picture)]
    )
    assert accuracy >= 0.95
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capfd.readouterr()
    assert str(picture) in printed.out
    assert re.search(r"40/40.*accuracy=9\d\.\d%, loss=0\.\d+", printed.err)


def test_digits_are_split_without_overlap():
    splits = runpy.run_path(str(EXAMPLES / "digits.py"))["load_splits"](seed=0)
    assert [len(split.labels) for split in splits] == [1293, 144, 360]
    for split in splits:
        np.testing.assert_allclose(np.bincount(split.labels) / len(split.labels), 0.1, atol=0.03)
    train, val, test = ({image.tobytes() for image in np.asarray(s.images)} for s in splits)
    assert not test & (train | val)


@pytest.mark.parametrize("flag", ["--epochs", "--batch-size", "--sizes", "--seed", "--output"])
def test_digits_explains_its_flags(flag, capsys):
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(EXAMPLES / "digits.py"))["main"](["--help"])
    assert flag in capsys.readouterr().out


@pytest.mark.parametrize("flags", [["--batch-size", "2000"], ["--epochs", "0"]])
def test_digits_refuses_bad_flags(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(EXAMPLES / "digits.py"))["main"](flags)
    assert flags[0] in capsys.readouterr().err


@pytest.mark.slow
def test_fully_convolutional(tmp_path, capfd):
    picture = tmp_path / "new" / "page.png"
    main = runpy.run_path(str(EXAMPLES / "fully_convolutional.py"))["main"]
    result = main(
        ["--epochs", "15", "--page-size", "96", "160", "--digits", "50", "--output", str(picture)]
    )
    assert result.test_accuracy >= 0.93
    assert result.recall >= 0.85
    assert result.precision >= 0.85
    assert result.max_difference <= 1e-4
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capfd.readouterr()
    assert str(picture) in printed.out
    assert re.search(r"15/15.*loss=0\.\d+", printed.err)


@pytest.mark.parametrize(
    "flags", [["--epochs", "0"], ["--page-size", "4", "9"], ["--digits", "200"]]
)
def test_fully_convolutional_refuses_bad_flags(flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(EXAMPLES / "fully_convolutional.py"))["main"](flags)
    assert flags[0] in capsys.readouterr().err


def test_linear_by_hand(capsys):
    example = runpy.run_path(str(EXAMPLES / "linear_by_hand.py"))
    assert example["one_output"]() == pytest.approx(-1.4166, abs=5e-5)
    assert example["a_batch"]().shape == (3, 10)
    assert "apply_linear(params, x) = -1.4166" in capsys.readouterr().out


@pytest.fixture
def load_main(monkeypatch):
    """Loads an example that imports another one, which a script finds beside it."""
    monkeypatch.syspath_prepend(EXAMPLES)
    yield lambda name: runpy.run_path(str(EXAMPLES / name))["main"]
    sys.modules.pop("digits", None)


@pytest.mark.slow
def test_compress_digits(load_main, tmp_path, capfd):
    picture = tmp_path / "new" / "compress.png"
    rows, chosen = load_main("compress_digits.py")(
        ["--epochs", "12", "--tuning-epochs", "3", "--ranks", "16", "--output", str(picture)]
    )
    trained, *others = rows
    assert trained.test >= 0.94
    assert chosen in others
    assert chosen.bytes <= trained.bytes / 10
    assert chosen.test >= trained.test - 0.005
    forms = {row.form: row for row in rows}
    assert forms["bfloat16"].bytes == trained.bytes / 2
    assert forms["int8"].bytes <= trained.bytes * 0.26
    assert forms["int8"].test == pytest.approx(trained.test, abs=0.01)
    assert forms["low rank, tuned"].bytes == forms["low rank"].bytes
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capfd.readouterr()
    assert str(picture) in printed.out
    assert f"→ {chosen.form} {chosen.detail}" in printed.out
    assert "12/12" in printed.err


@pytest.mark.slow
def test_lora_digits(load_main, capsys):
    result = load_main("lora_digits.py")(["--epochs", "15", "--adapter-epochs", "15"])
    assert result.before.old >= 0.95
    assert result.before.new <= 0.05
    assert result.after.new >= 0.8
    assert result.without == result.before
    assert result.trained < result.parameters / 10
    assert result.merged_difference <= 1e-5
    for layer, before in zip(result.adapted, result.pretrained, strict=True):
        assert np.asarray(layer.base.weight).tobytes() == np.asarray(before.weight).tobytes()
        assert np.asarray(layer.base.bias).tobytes() == np.asarray(before.bias).tobytes()
        assert np.any(layer.up)
        assert layer.scale == 2
    assert f"{result.trained:,} of {result.parameters:,} parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("compress_digits.py", ["--ranks", "17"]),
        ("compress_digits.py", ["--tuning-epochs", "0"]),
        ("lora_digits.py", ["--rank", "0"]),
        ("lora_digits.py", ["--adapter-epochs", "0"]),
    ],
)
def test_adapting_examples_refuse_bad_flags(load_main, name, flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        load_main(name)(flags)
    assert flags[0] in capsys.readouterr().err
