"""The commands, as a shell sees them: what they print, and the code that they exit with."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from parameternet.cli.release import release
from parameternet.cli.train import train
from parameternet.cli.val import val
from parameternet.training.checkpoint import load_last

ROOT = Path(__file__).parents[2]


@pytest.fixture
def recipe_file(tmp_path, recipe):
    path = tmp_path / "colours.yaml"
    path.write_text(recipe(epochs=1).to_yaml())
    return path


def call(command, *arguments):
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


def test_train_val_release(tmp_path, recipe_file, pictures):
    done = call(train, recipe_file, "--output", tmp_path / "run", "--set", "lr=1e-2")
    assert done.exit_code == 0, done.output
    assert "test_efficientnet: " in done.output
    assert "epoch 1  step 6/6  loss" in done.output
    assert "best: top1" in done.output
    done = call(val, tmp_path / "run", "--data", pictures / "val", "--workers", 0)
    assert done.exit_code == 0, done.output
    assert "(95 %, 15 images)" in done.output
    assert ": agrees" in done.output
    done = call(val, tmp_path / "run", "--data", pictures / "val", "--workers", 0, "--json")
    assert json.loads(done.output)["images"] == 15
    done = call(release, tmp_path / "run", "test_efficientnet.x", "--data", pictures / "val", "--destination",
                tmp_path / "shelf", "--workers", 0)  # fmt: skip
    assert done.exit_code == 0, done.output
    config = tmp_path / "shelf" / "test_efficientnet.x" / "config.json"
    changed = json.loads(config.read_text())
    changed["results"]["top1"] += 1
    config.write_text(json.dumps(changed))
    done = call(val, config.parent, "--data", pictures / "val", "--workers", 0)
    assert done.exit_code == 1
    assert "DISAGREES" in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "weight_decai=1"], "closest: weight_decay"),
        (["--set", "train=/no/such/place"], "'/no/such/place' does not exist"),
        (["--set", "model=parameternet_60m"], "closest: parameternet_"),
    ],
)
def test_errors_are_one_sentence(tmp_path, recipe_file, arguments, message):
    done = call(train, recipe_file, "--output", tmp_path / "run", *arguments)
    assert done.exit_code == 1
    assert message in done.output
    assert "Traceback" not in done.output


def test_the_fields_are_listed_with_their_documentation():
    done = call(train, "--fields")
    assert "weight_decay: 0.05\n    weight decay; not applied to biases and norms\n    at least 0\n" in done.output
    assert (
        "scale: [0.08, 1.0]\n    training crop: fraction of the area, [from, to]\n    2 numbers, each above 0 "
        in done.output
    )
    assert "no_aug: False\n    no augmentation: resize and center crop only\n    true or false\n" in done.output


def test_signals_leave_a_checkpoint_and_their_code(tmp_path, recipe):
    """Ctrl-C reaches the whole group, workers too; SIGTERM the process alone."""
    path = tmp_path / "long.yaml"
    path.write_text(recipe(epochs=1000, workers=1).to_yaml())
    folders = {signal.SIGINT: tmp_path / "int", signal.SIGTERM: tmp_path / "term"}
    processes = {signum: _start(path, folder) for signum, folder in folders.items()}
    for signum, process in processes.items():
        _wait_for(folders[signum] / "history.csv", process)
    os.killpg(processes[signal.SIGINT].pid, signal.SIGINT)
    processes[signal.SIGTERM].send_signal(signal.SIGTERM)
    for signum, process in processes.items():
        _, errors = process.communicate(timeout=90)
        assert process.returncode == 128 + signum, errors
        assert f"stopped by {signum.name}" in errors
        assert "Traceback" not in errors
        assert json.loads(load_last(folders[signum])["progress"])["updates"] >= 6


def _start(recipe: Path, folder: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "parameternet.cli.train", str(recipe), "--output", str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 150
    while not path.exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.05)
