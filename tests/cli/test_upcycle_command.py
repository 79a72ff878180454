"""`parameternet upcycle` says what it did, and what it writes is used by other commands."""

import pytest
from click.testing import CliRunner
from trained import trained

from parameternet import cli, weights


def run(*arguments, code=0):
    done = CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    return done


@pytest.fixture
def file(tmp_path):
    weights.save(trained("mobilenetv3_small_050", num_classes=7).state_dict(), tmp_path / "dense.safetensors")
    return tmp_path / "dense.safetensors"


def test_it_reports_what_changed(file, tmp_path):
    arguments = ("upcycle", file, "--architecture", "mobilenetv3_small_050", "-o", tmp_path / "out")
    words = run(*arguments, "--experts", "2", "--kind", "pointwise", "--min-channels", "16").output
    lines = [line.split("  ") for line in words.splitlines()]
    rows = {line[0].strip(): line[-1].strip() for line in lines}
    assert rows["the stem"] == "1" and "depthwise, not pointwise" in rows and "fewer than 16 channels" in rows
    assert float(words.rpartition("largest output: ")[2].split()[0]) <= 1e-5
    assert "parameters" in rows and "MACs per image" in rows
    assert "already holds a checkpoint" in run(*arguments, code=1).stderr
    every = run(*arguments, "--overwrite", "--layers").stdout
    assert "conv_stem" in every and "classifier" not in every
    answer = run("predict", "--model", tmp_path / "out", "tests/photos/cat.jpg", "--topk", "1").stdout
    assert "class " in answer


def test_usage_errors(tmp_path):
    assert "or the name of a model" in run("upcycle", "resnet_x", "-o", tmp_path / "out", code=2).stderr
    assert "Missing option" in run("upcycle", "resnet18", code=2).stderr
    assert not (tmp_path / "out").exists()
