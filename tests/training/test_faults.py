"""What must never end well in silence: two processes in one run folder, and networks whose numbers are none."""

import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from stopping import Stop
from test_run import load_rows, same_state

from parameternet import files, weights
from parameternet.hub import release
from parameternet.hub.release import record, replace_folder
from parameternet.training import (
    CheckpointError,
    DataError,
    DivergedError,
    FolderInUse,
    Interrupted,
    RecipeError,
    Reporter,
    run,
    validate,
)
from parameternet.training import checkpoint as checkpoints
from parameternet.training import trainer as trainers
from parameternet.training.checkpoint import load_last, save_last, save_weights
from parameternet.training.distributed import Place
from parameternet.training.learner import Learner
from parameternet.training.trainer import Trainer

ROOT = Path(__file__).parents[2]


# ------------------------------------------------------------------------------------------- one folder, one process


class Announce(Reporter):
    """Tells at the first step, and then waits."""

    def __init__(self, ready):
        self.ready = ready

    def step(self, *_):
        self.ready.set()
        time.sleep(300)


def _train_slowly(recipe, folder, ready):
    run(recipe, folder, Announce(ready))


@pytest.fixture
def busy(tmp_path, recipe):
    """A run folder, and a process in the middle of its run."""
    spawn = multiprocessing.get_context("spawn")  # autograd's threads do not survive a fork
    ready, folder = spawn.Event(), tmp_path / "runs" / "busy"
    child = spawn.Process(target=_train_slowly, args=(recipe(workers=1), folder, ready))
    child.start()
    assert ready.wait(120)
    yield folder, child
    child.kill()
    child.join()


def test_the_second_process_on_a_run_folder_is_refused(busy, recipe, tmp_path):
    folder, child = busy
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    link = tmp_path / "link"
    link.symlink_to(folder)
    for way in (folder, link, folder.parent / ".." / "runs" / "busy"):
        with pytest.raises(FolderInUse, match=rf"busy|link.* is in use by process {child.pid} on .* since 20"):
            run(recipe(), way)
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(recipe().to_yaml())
    command = [sys.executable, "-m", "parameternet.cli.train", str(recipe_file), "--output", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert f"is in use by process {child.pid}" in done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_killed_process_releases_its_lock_while_workers_survive(busy, recipe):
    folder, child = busy
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert run(recipe(), folder)["last"]["epoch"] == 2
    assert not (folder / ".lock").exists()


def test_two_threads_do_not_share_a_run_folder_and_an_error_frees_it(tmp_path, recipe):
    class Inside(Reporter):
        refused = 0

        def step(self, *_):
            if not self.refused:
                with pytest.raises(FolderInUse, match=rf"this process \({os.getpid()}\)"):
                    run(recipe(), tmp_path)
                self.refused += 1
                raise ZeroDivisionError

    reporter = Inside()
    with pytest.raises(ZeroDivisionError):
        run(recipe(), tmp_path, reporter)
    assert reporter.refused == 1
    assert run(recipe(), tmp_path)["last"]["epoch"] == 2


def test_two_releases_of_one_name_do_not_mix(tmp_path, recipe, pictures):
    run(recipe(epochs=1), tmp_path / "run")
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    arguments = dict(destination=shelf, records=shelf / "records.json", workers=0)
    name = "test_efficientnet.x"

    class Inside(Reporter):
        def validating(self, *_):
            with pytest.raises(FolderInUse, match=r"the checkpoint .*test_efficientnet\.x is in use by this process"):
                release(tmp_path / "run", name, str(pictures / "val"), **arguments)

    release(tmp_path / "run", name, str(pictures / "val"), reporter=Inside(), **arguments)
    assert {path.name for path in shelf.iterdir()} == {name, "records.json"}


def test_records_of_many_releases_are_all_kept(tmp_path):
    fork = multiprocessing.get_context("fork")
    path = tmp_path / "records.json"

    def enter(n):
        for i in range(10):
            record(f"{n}.{i}", {"sha256": str(i)}, path)

    children = [fork.Process(target=enter, args=(n,)) for n in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert len(json.loads(path.read_text())) == 30


def test_a_release_interrupted_while_replacing_the_old_checkpoint_keeps_it(tmp_path, recipe, pictures, monkeypatch):
    run(recipe(epochs=1), tmp_path / "run")
    name, shelf = "test_efficientnet.x", tmp_path / "shelf"
    arguments = (tmp_path / "run", name, str(pictures / "val"))
    release(*arguments, destination=shelf, workers=0)
    before = {path.name: path.read_bytes() for path in (shelf / name).iterdir()}
    real, refused = Path.rename, []

    def refuse(self, target):
        if Path(target) == shelf / name and not refused:
            refused.append(self)
            raise KeyboardInterrupt
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(KeyboardInterrupt):
            release(*arguments, destination=shelf, workers=0)
    assert refused
    assert {path.name: path.read_bytes() for path in (shelf / name).iterdir()} == before


def test_kill_while_removing_the_replaced_checkpoint_leaves_nothing_to_restore(tmp_path, monkeypatch):
    folder, fresh = tmp_path / "net.x", tmp_path / ".net.x.new"
    for path in (folder, fresh):
        path.mkdir()
        (path / "config.json").write_text(path.name)

    def killed(path, **_):
        if Path(path).exists():
            (Path(path) / "config.json").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        replace_folder(folder, fresh)
    assert not (tmp_path / ".net.x.old").exists()  # or the next release might take it for the checkpoint


def test_best_weights_without_last_do_not_get_another_recipe(tmp_path, recipe):
    run(recipe(epochs=1), tmp_path)
    (tmp_path / "last.ckpt").unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with pytest.raises(CheckpointError, match=r"holds a run with another recipe \(lr: 0.003 -> 0.1\)"):
        run(recipe(epochs=1, lr=0.1), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    run(recipe(epochs=1), tmp_path)  # a run killed between its first best weights and its first checkpoint


# --------------------------------------------------------------------------------------------------- not a number


def poison(monkeypatch, after: int, what: str) -> None:
    """After so many updates the network's weights or batch statistics (or the average's) become NaN or infinite."""
    real, seen = Learner.update, []

    def update(self, number):
        real(self, number)
        seen.append(1)
        if len(seen) == after:
            network = self.ema.module if what.startswith("average") else self.model
            with torch.no_grad():
                if what == "statistics":
                    network.bn1.running_mean.fill_(math.nan)
                else:
                    network.classifier.bias[0] = math.inf if what.endswith("inf") else math.nan

    monkeypatch.setattr(Learner, "update", update)


def all_finite(path) -> bool:
    return all(torch.isfinite(tensor.float()).all() for tensor in weights.read(path).values())


KINDS = ["weights", "weights inf", "statistics", "average"]


@pytest.mark.parametrize("validated", [True, False], ids=["validated", "not-validated"])
@pytest.mark.parametrize("what", KINDS)
def test_a_network_that_diverges_in_the_last_update_is_never_the_best(tmp_path, recipe, monkeypatch, what, validated):
    """The loss of the last step is still finite: it comes from before the update."""
    changes = {} if validated else {"val": None}
    changes |= {} if what == "average" else {"ema_decay": None}
    poison(monkeypatch, 12, what)
    with pytest.raises(DivergedError, match=r"diverged in epoch 2: .*(nan|NaN).*lower lr.*another run folder"):
        run(recipe(**changes), tmp_path)
    assert all_finite(tmp_path / "best.safetensors")
    state = load_last(tmp_path)
    assert json.loads(state["progress"])["updates"] == 6
    assert all(torch.isfinite(tensor.float()).all() for tensor in state["model"].values())
    assert [row["epoch"] for row in load_rows(tmp_path)] == ["1"]


def test_diverged_first_epoch_leaves_no_checkpoint_and_can_be_rerun(tmp_path, recipe, monkeypatch):
    with monkeypatch.context() as patch:
        poison(patch, 6, "weights")
        with pytest.raises(DivergedError, match="epoch 1"):
            run(recipe(), tmp_path)
    assert not (tmp_path / "last.ckpt").exists()
    assert not (tmp_path / "best.safetensors").exists()
    with monkeypatch.context() as patch:
        poison(patch, 12, "weights")
        with pytest.raises(DivergedError, match="epoch 2"):
            run(recipe(), tmp_path)
    run(recipe(), tmp_path)  # what made it diverge is gone: it resumes from the last checkpoint that was whole
    run(recipe(), tmp_path / "whole")
    same_state(tmp_path / "whole", tmp_path)


def test_a_checkpoint_in_an_epoch_is_never_of_a_diverged_network(tmp_path, recipe, monkeypatch):
    poison(monkeypatch, 4, "weights")
    with pytest.raises(DivergedError, match="epoch 1"):
        run(recipe(checkpoint_minutes=0, log_every=100), tmp_path)
    assert json.loads(load_last(tmp_path)["progress"])["updates"] == 3


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_validation_loss_that_is_no_number_ends_the_run(tmp_path, recipe, monkeypatch, value):
    real = trainers.evaluate
    monkeypatch.setattr(trainers, "evaluate", lambda *a, **k: {**real(*a, **k), "loss": value, "top1": 100.0})
    with pytest.raises(DivergedError, match=f"epoch 1: the validation loss is {value}"):
        run(recipe(), tmp_path)
    assert not (tmp_path / "best.safetensors").exists()


def test_old_run_that_finished_with_nan_is_rejected(tmp_path, recipe):
    run(recipe(), tmp_path)
    state = load_last(tmp_path)
    progress = json.loads(state["progress"])
    progress["rows"][-1]["val_loss"] = math.nan
    save_last(tmp_path, {**state, "progress": json.dumps(progress)})
    with pytest.raises(DivergedError, match=r"diverged in epoch 2 \(validation loss nan\) and cannot be resumed"):
        run(recipe(), tmp_path)
    state["model"]["classifier.bias"][0] = math.nan
    save_last(tmp_path, state)
    with pytest.raises(DivergedError, match="NaN in its weights"):
        run(recipe(), tmp_path)


def test_the_command_exits_with_an_error_and_names_no_best(tmp_path, recipe):
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe(lr=1e30, opt="sgd", warmup_epochs=0, sched="none").to_yaml())
    command = [sys.executable, "-m", "parameternet.cli.train", str(path), "--output", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "diverged in epoch 1" in done.stderr
    assert "Traceback" not in done.stderr
    assert "best" not in done.stdout


def test_network_with_nan_outputs_is_not_measured(tmp_path, recipe, pictures):
    run(recipe(epochs=1), tmp_path)
    path = tmp_path / "best.safetensors"
    state, config = weights.read(path), json.loads(weights.metadata(path)["config"])
    state["classifier.bias"][1] = math.nan
    save_weights(path, state, config)
    with pytest.raises(DivergedError, match=r"the loss of .* is nan"):
        validate(tmp_path, str(pictures / "val"), workers=0)
    with pytest.raises((DivergedError, CheckpointError)):
        release(tmp_path, "test_efficientnet.x", str(pictures / "val"), destination=tmp_path / "shelf", workers=0)
    assert not list((tmp_path / "shelf").iterdir())


# ------------------------------------------------------------------------------------- the checkpoint is enough


def test_a_run_resumes_when_init_and_class_names_are_gone(tmp_path, recipe):
    run(recipe(epochs=1, seed=5), tmp_path / "init")
    names = tmp_path / "names.txt"
    names.write_text("blue\tthe sky\ngreen\tgrass\nred\ta rose\n")
    changes = dict(init=str(tmp_path / "init"), class_names=str(names))
    run(recipe(**changes), tmp_path / "whole")
    with pytest.raises(Interrupted):
        run(recipe(**changes), tmp_path / "stopped", Stop(8, signal.SIGTERM))
    shutil.rmtree(tmp_path / "init")
    names.unlink()
    run(recipe(**changes), tmp_path / "stopped")
    same_state(tmp_path / "whole", tmp_path / "stopped")
    with pytest.raises(CheckpointError, match=r"init: no weights at .*: no such folder or file"):
        run(recipe(init=str(tmp_path / "init")), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_leftovers_of_a_killed_run_are_removed(tmp_path, recipe):
    run(recipe(epochs=1), tmp_path)
    for name in ("last.ckpt", "best.safetensors", "recipe.yaml", "history.csv", "curves.png"):
        (tmp_path / f".{name}.77.abc.tmp").write_text("half")
    run(recipe(epochs=1), tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_locks_are_reported_as_training_errors(tmp_path):
    with files.lock(tmp_path / ".lock", "x"), pytest.raises(FolderInUse), checkpoints.claimed(tmp_path / ".lock", "x"):
        pass


# ------------------------------------------------------------------------------------------------- network

FIXED = dict(dynamic_img_size=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model_kwargs=dict(in_chans=1)), "model_kwargs: in_chans must be 3, got 1"),
        (dict(model_kwargs=dict(num_clases=1)), "model_kwargs: test_efficientnet has no argument 'num_clases'"),
        (dict(model_kwargs=dict(stem_sizes=1)), "has no argument 'stem_sizes'; closest: stem_size"),
        (dict(model_kwargs=dict(stem_sizes=None)), "has no argument 'stem_sizes'; closest: stem_size"),
        (
            dict(model="parameternet_50m", model_kwargs=dict(routing_norm=None)),
            "model_kwargs: routing_norm is null, which timm replaces with the default 'layer'",
        ),
        (
            dict(model="dynamic_efficientnet_lite0", model_kwargs=dict(routing_norm=None)),
            "model_kwargs: routing_norm is null, which timm replaces with the default 'layer'",
        ),
        (dict(model_kwargs=dict(num_classes=4)), "num_classes is not an argument.*set the field num_classes"),
        (dict(model_kwargs=dict(drop_rate=0.1)), "set the field drop_rate"),
        (dict(model_kwargs=dict(checkpoint_path="x.pth")), "set the field init"),
        (dict(model_kwargs=dict(features_only=True)), "only classifiers are trained"),
        (dict(model_kwargs=dict(stem_size="wide")), "model_kwargs: test_efficientnet cannot be built"),
        (dict(model_kwargs=dict(stem_size=-1)), "model_kwargs: test_efficientnet cannot be built"),
        (dict(model_kwargs=dict(global_pool="")), "test_efficientnet with .*global_pool.* does not accept images"),
        (dict(model="parameternet_50m", model_kwargs=dict(num_expert=4)), "'num_expert'; closest: num_experts"),
        (dict(model="test_vit", model_kwargs=dict(img_size=64) | FIXED), "input_size: test_vit with .* of 32 x 32"),
        (dict(model="test_vit", model_kwargs=dict(img_size=32) | FIXED, test_input_size=48), "test_input_size.* 48"),
        (
            dict(
                model="test_vit", model_kwargs=dict(img_size=32) | FIXED,
                resolution_schedule=[dict(until_epoch=1, input_size=16)],
            ),
            "resolution_schedule: .* of 16 x 16",
        ),
        (dict(opt_kwargs=dict(betta=1)), "opt: optimizer 'adamw'.*betta"),
        (dict(opt_kwargs=dict(betas=[2.0, 0.9])), "opt: optimizer 'adamw'"),
        (dict(sched_kwargs=dict(nonsense=1)), "sched: schedule 'cosine'.*nonsense"),
        (dict(train="/no/such"), "train: '/no/such' does not exist"),
        (dict(val=dict(root="/no/such")), "val: cannot read images"),
        (dict(train=dict(nonsense=1)), "train: cannot read images"),
    ],
)  # fmt: skip
def test_unsupported_network_arguments_are_rejected_before_writing(tmp_path, recipe, changes, message):
    with pytest.raises(ValueError, match=message):
        run(recipe(**changes), tmp_path / "runs" / "new")
    assert not list(tmp_path.iterdir())


def test_a_device_that_does_not_exist_is_a_bad_value(tmp_path, recipe):
    with pytest.raises(RecipeError, match="device 'abacus'"):
        run(recipe(device="abacus"), tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_processes_that_find_other_classes_stop_before_the_first_step(tmp_path, recipe, monkeypatch):
    place = Place(0, 1, torch.device("cpu"))
    monkeypatch.setattr(Place, "gather", lambda self, item: [item, item, item[::-1]] if item else [item])
    with pytest.raises(DataError, match="processes 0 and 2 find different classes"):
        Trainer(recipe(), tmp_path, place, Reporter())


def test_teacher_with_nan_predictions_is_rejected_and_not_cached(tmp_path, recipe, pictures):
    run(recipe(epochs=1), tmp_path / "teacher")
    path = tmp_path / "teacher" / "best.safetensors"
    state, config = weights.read(path), json.loads(weights.metadata(path)["config"])
    state["classifier.bias"][1] = math.nan
    save_weights(path, state, config)
    taught = dict(cache="device", cache_size=32, auto_augment=None, mixup=0.0, cutmix=0.0, teacher=str(path))
    with pytest.raises(CheckpointError, match=r"teacher: .* predicts NaN"):
        run(recipe(**taught), tmp_path / "run")
    assert not (tmp_path / "run").exists()
