"""Two processes on one machine, started by torchrun, against one process: the same images, the same weights."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from parameternet import files
from parameternet.training import RecipeError, Reporter, TrainingError, run
from parameternet.training.checkpoint import load_last
from parameternet.training.distributed import Place, agree_on_life, choose_device
from parameternet.training.trainer import Trainer


@pytest.fixture
def still(recipe):
    """A recipe whose network has no batch norm and draws nothing, so that processes cannot differ by either."""
    return recipe(
        model="test_vit",
        model_kwargs={"img_size": 32},
        mixup=0.0,
        cutmix=0.0,
        reprob=0.0,
        drop_rate=0.0,
        drop_path_rate=0.0,
        opt="momentum",
        lr=0.05,
        batch_size=6,
        epochs=2,
    )


def torchrun(tmp_path, recipe, *arguments, **environment):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    command += [str(Path(__file__).with_name("worker.py")), str(path), str(tmp_path / "two")]
    search = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    variables = {"PYTHONPATH": search, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    variables |= {"PYTHONFAULTHANDLER": "1", **environment}
    return subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=300)


def test_two_processes_match_one_even_if_a_worker_is_killed(tmp_path, still):
    still.checkpoint_minutes = 0  # a checkpoint at every update
    done = torchrun(tmp_path, still, "--max-restarts", "1", KILL_AT="6")
    assert done.returncode == 0, done.stderr
    assert "exitcode: -9" in done.stderr  # it did die
    run(still, tmp_path / "one")
    one, two = load_last(tmp_path / "one"), load_last(tmp_path / "two")
    for part in ("model", "ema"):
        for name, value in one[part].items():
            assert torch.allclose(value, two[part][name], atol=2e-6), f"{part} {name}"
    mine, theirs = (json.loads(state["progress"]) for state in (one, two))
    assert theirs["updates"] == mine["updates"] == 8
    assert [row["images"] for row in theirs["rows"]] == [15, 15]  # an odd number over two processes, each once
    assert theirs["rows"][-1]["val_loss"] == pytest.approx(mine["rows"][-1]["val_loss"], rel=1e-4)


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path, recipe):
    place = Place(0, 4, torch.device("cpu"))
    with pytest.raises(RecipeError, match="batch_size 6 cannot be split among 4 processes"):
        Trainer(recipe(batch_size=6), tmp_path, place, Reporter())
    with pytest.raises(RecipeError, match="each process gets 1 of batch_size 4"):
        Trainer(recipe(batch_size=4), tmp_path, place, Reporter())


@pytest.mark.parametrize("late", [0, 1, 2])
def test_each_life_of_a_run_gets_a_name_of_its_own(late):
    """Processes of a life meet in a store that still has what earlier lives left, complete or not."""
    store, names = dist.HashStore(), []

    def join(rank, world=3, delay=0.0):
        time.sleep(delay)
        found[rank] = agree_on_life(store, rank, world)

    for _ in range(3):
        found: dict[int, str] = {}
        threads = [threading.Thread(target=join, args=(rank, 3, 0.2 * (rank == late))) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(found) == 3
        assert len(set(found.values())) == 1
        names += found[0], "unfinished"
        store.set("life", "unfinished")  # a first process that ended before the others had answered
        store.set("unfinished/1", "someone")
    assert len(set(names)) == 4


def test_all_processes_raise_what_the_first_one_raises(tmp_path, still):
    """Only the first process locks the folder; the others follow, and both end with the sentence."""
    (tmp_path / "two").mkdir()
    with files.lock(tmp_path / "two" / ".lock", "it"):
        done = torchrun(tmp_path, still, TAKEOVER="0")
    assert done.returncode == 1
    assert done.stderr.count(f"is in use by process {os.getpid()}") >= 2
    assert list((tmp_path / "two").iterdir()) == []


def test_devices():
    assert choose_device("cpu").type == "cpu"
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(TrainingError, match="use auto, cpu, cuda, cuda:1 or mps"):
        choose_device("abacus")


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_gpu_is_named_with_its_index(name, monkeypatch):
    """torch.cuda.set_device refuses a bare 'cuda', which `auto` was on one GPU."""
    set_to = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: set_to.append(device))
    monkeypatch.setattr(torch, "empty", lambda *size, device: None)
    assert choose_device(name) == torch.device("cuda", 0)
    assert set_to == [torch.device("cuda", 0)]
