"""The examples run, and do what they say."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def load(monkeypatch):
    """Loads an example as a module, with the helpers that a script finds beside it."""
    monkeypatch.syspath_prepend(EXAMPLES)
    yield lambda name: runpy.run_path(str(EXAMPLES / name))
    for helper in ("common", "pages"):
        sys.modules.pop(helper, None)


@pytest.mark.slow
def test_digits(load, tmp_path, capfd):
    picture = tmp_path / "new" / "digits.png"
    accuracy = load("digits.py")["main"](["--epochs", "40", "--output", str(picture)])
    assert accuracy >= 0.95
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capfd.readouterr()
    assert str(picture) in printed.out
    assert re.search(r"epoch=40/40, loss=\S+, accuracy=0\.9\d+", printed.err)


def demo_in_the_readme():
    """The lines that README.md shows under `$ make demo`, without the empty ones."""
    block = re.search(
        r"```text\n\$ make demo.*?\n(.*?)\n(?:\$|```)", (ROOT / "README.md").read_text(), re.S
    )
    return [line for line in block[1].splitlines() if line]


def run_script(name, *flags, folder):
    """Runs an example as a user does, with XLA's optimizations."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *flags],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )


@pytest.mark.slow
def test_the_readme_shows_what_the_demo_prints(tmp_path):
    run = run_script("digits.py", folder=tmp_path)
    bar = run.stderr.replace("\r", "\n").splitlines()[-1]

    def without_what_varies(line):
        if "%|" in line:  # A bar: how much, and what it shows.
            return re.match(r".*?\| (\S+)", line)[1], re.findall(r"(\w+)=", line), "150/150" in line
        return re.sub(r"\S+/outputs/", "…/outputs/", line)

    printed = [without_what_varies(line) for line in (*run.stdout.splitlines(), bar)]
    shown = [without_what_varies(line) for line in demo_in_the_readme()]
    assert len(shown) >= 4
    assert [line for line in shown if line not in printed] == []


def test_digits_are_split_without_overlap(load):
    splits = load("common.py")["digits"](seed=0)
    assert [len(split.labels) for split in splits] == [1293, 144, 360]
    for split in splits:
        np.testing.assert_allclose(np.bincount(split.labels) / len(split.labels), 0.1, atol=0.03)
    train, val, test = ({image.tobytes() for image in np.asarray(s.images)} for s in splits)
    assert not test & (train | val)


@pytest.mark.parametrize("flag", ["--epochs", "--batch-size", "--sizes", "--seed", "--output"])
def test_digits_explains_its_flags(load, flag, capsys):
    with pytest.raises(SystemExit, match="0"):
        load("digits.py")["main"](["--help"])
    assert flag in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("digits.py", ["--batch-size", "2000"]),
        ("digits.py", ["--batch-size", "0"]),
        ("digits.py", ["--epochs", "0"]),
        ("digits.py", ["--epochs", "many"]),
        ("fully_convolutional.py", ["--epochs", "0"]),
        ("fully_convolutional.py", ["--page-size", "4", "9"]),
        ("fully_convolutional.py", ["--digits", "200"]),
        ("compress_digits.py", ["--ranks", "17"]),
        ("compress_digits.py", ["--tuning-epochs", "0"]),
        ("lora_digits.py", ["--rank", "0"]),
        ("lora_digits.py", ["--rank", "11"]),
        ("lora_digits.py", ["--adapter-epochs", "0"]),
        ("which_digits_are_hard.py", ["--swapped", "1294"]),
        ("which_digits_are_hard.py", ["--noise-multiplier", "0"]),
        ("character_model.py", ["--steps", "0"]),
        ("character_model.py", ["--policy-steps", "100000"]),
        ("resume.py", ["--epochs", "1"]),
    ],
)
def test_examples_refuse_bad_flags(load, name, flags, capsys):
    with pytest.raises(SystemExit, match="2"):
        load(name)["main"](flags)
    assert flags[0] in capsys.readouterr().err


@pytest.mark.slow
def test_fully_convolutional(load, tmp_path, capfd):
    picture = tmp_path / "new" / "page.png"
    main = load("fully_convolutional.py")["main"]
    result = main(
        ["--epochs", "2", "--page-size", "96", "160", "--digits", "50", "--output", str(picture)]
    )
    assert result.test_accuracy >= 0.93
    assert result.recall >= 0.85
    assert result.precision >= 0.85
    assert result.max_difference <= 1e-4
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capfd.readouterr()
    assert str(picture) in printed.out
    assert re.search(r"epoch=2/2, loss=\S+, accuracy=(1|0\.9)", printed.err)


def test_linear_by_hand(capsys):
    example = runpy.run_path(str(EXAMPLES / "linear_by_hand.py"))
    assert example["one_output"]() == pytest.approx(-1.4166, abs=5e-5)
    assert example["a_batch"]().shape == (3, 10)
    assert "apply_linear(params, x) = -1.4166" in capsys.readouterr().out


@pytest.mark.slow
def test_compress_digits(load, tmp_path, capfd):
    picture = tmp_path / "new" / "compress.png"
    rows, chosen = load("compress_digits.py")["main"](
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
def test_lora_digits(load, capsys):
    result = load("lora_digits.py")["main"](["--epochs", "15", "--adapter-epochs", "15"])
    assert result.before.old >= 0.95
    assert result.before.new <= 0.05
    assert result.after.new >= 0.8
    assert result.without == result.before
    assert result.trained < result.parameters / 10
    assert result.difference <= 1e-5
    for layer, before in zip(result.adapted, result.pretrained, strict=True):
        assert np.asarray(layer.weight.base).tobytes() == np.asarray(before.weight).tobytes()
        assert np.asarray(layer.bias).tobytes() == np.asarray(before.bias).tobytes()
        assert np.any(layer.weight.up)
        assert layer.weight.scale == 2
    assert f"{result.trained:,} of {result.parameters:,} parameters" in capsys.readouterr().out


@pytest.mark.slow
def test_which_digits_are_hard(load, tmp_path, capfd):
    picture = tmp_path / "new" / "hard.png"
    flags = ["--epochs", "10", "--private-steps", "60", "--output", str(picture)]
    result = load("which_digits_are_hard.py")["main"](flags)
    labels, count = result.labels, len(result.labels.given)
    assert labels.swapped.sum() == 65
    np.testing.assert_array_equal(labels.given != labels.true, labels.swapped)
    for found in result.found.values():
        assert found.shape == (count,)
        assert found[-1] == 1
    assert result.found["by gradient norm"][count // 10] >= 0.9
    assert result.found["by influence"][count // 10] >= 0.4
    assert result.test >= 0.93
    accuracies, epsilons = result.private
    assert accuracies[-1] >= 0.8
    assert (np.diff(epsilons) > 0).all()
    assert epsilons[-1] == pytest.approx(2.8, abs=0.1)
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capfd.readouterr()
    assert str(picture) in printed.out
    assert "60/60" in printed.err


@pytest.mark.slow
def test_character_model(load, tmp_path, capfd):
    picture = tmp_path / "new" / "model.png"
    flags = ["--steps", "200", "--student-steps", "200", "--policy-steps", "20"]
    result = load("character_model.py")["main"]([*flags, "--output", str(picture)])
    assert result.from_teacher < result.from_text < 2.5
    assert result.teacher < 2.2
    shares = result.policy["share"]
    assert shares[-5:].mean() < 0.3 * shares[:2].mean()
    before, after = ("".join(texts).count("e") for texts in (result.before, result.after))
    assert after < before
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capfd.readouterr()
    assert str(picture) in printed.out
    assert len(re.findall(r"100%.*epoch=1/1", printed.err)) >= 4


@pytest.mark.slow
def test_resume(load, tmp_path, capfd, monkeypatch):
    pytest.importorskip("orbax.checkpoint")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert load("resume.py")["main"](["--epochs", "4", "--output", str(tmp_path)])
    assert "the same to the last bit: True" in capfd.readouterr().out
    assert (tmp_path / "broken.png").exists()


@pytest.mark.slow
def test_slide_any_framework(tmp_path):
    for framework in ("equinox", "flax", "haiku"):
        pytest.importorskip(framework)
    picture = tmp_path / "new" / "page.png"
    flags = ("--epochs", "1", "--output", str(picture))
    run = run_script("slide_any_framework.py", *flags, folder=tmp_path)
    differences = re.findall(r"times as long; largest difference (\S+)", run.stdout)
    assert len(differences) == 3
    assert max(map(float, differences)) <= 1e-4
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(re.findall(r"100%.*epoch=1/1, loss=", run.stderr)) >= 3
