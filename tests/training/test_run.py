import csv
import errno
import json
import math
import os
import signal

import pytest
import torch
from pictures import draw
from safetensors import safe_open
from stopping import Stop

from parameternet import weights
from parameternet.training import (
    CheckpointError,
    DataError,
    DivergedError,
    Interrupted,
    RecipeError,
    Reporter,
    TrainingError,
    load_recipe,
    run,
)
from parameternet.training.build import freeze, make_model, make_optimizer
from parameternet.training.checkpoint import load_last
from parameternet.training.distributed import Place
from parameternet.training.trainer import Trainer


class Notes(Reporter):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def same_state(a, b) -> None:
    """Both folders hold bitwise the same run: weights, EMA, optimizer, progress and best weights."""
    a_state, b_state = load_last(a), load_last(b)
    for part in ("model", "ema"):
        for name, value in a_state[part].items():
            assert torch.equal(value, b_state[part][name]), f"{part} {name}"
    for key, slots in a_state["optimizer"]["state"].items():
        for name, value in slots.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(b_state["optimizer"]["state"][key][name]))
    assert a_state["scaler"] == b_state["scaler"]
    mine, theirs = (json.loads(state["progress"]) for state in (a_state, b_state))
    clocks = ("seconds", "images_per_second", "data_share")
    mine["rows"], theirs["rows"] = (
        [{k: v for k, v in row.items() if k not in clocks} for row in p["rows"]] for p in (mine, theirs)
    )
    assert mine == theirs
    assert (a / "best.safetensors").read_bytes() == (b / "best.safetensors").read_bytes()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pictures):
    """An uninterrupted run of the module's recipe."""
    folder = tmp_path_factory.mktemp("finished")
    return folder


@pytest.fixture
def whole(finished, recipe):
    if not (finished / "last.ckpt").exists():
        run(recipe(), finished)
    return finished


def test_a_run_folder_holds_everything(whole, recipe):
    names = {path.name for path in whole.iterdir()}
    assert names >= {"recipe.yaml", "history.csv", "curves.png", "last.ckpt", "best.safetensors"}
    assert not [name for name in names if name.endswith(".tmp")]
    assert load_recipe(whole / "recipe.yaml") == recipe()
    rows = load_rows(whole)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert [row["images"] for row in rows] == ["15", "15"]
    assert rows[-1]["updates"] == "12"
    config = json.loads(weights.metadata(whole / "best.safetensors")["config"])
    assert config["label_names"] == ["blue", "green", "red"]
    assert config["results"]["top1"] == pytest.approx(max(float(row["top1"]) for row in rows), abs=1e-3)


def test_it_learns(tmp_path, recipe):
    easy = dict(mixup=0.0, cutmix=0.0, reprob=0.0, auto_augment=None, drop_path_rate=0.0, ema_decay=None)
    result = run(recipe(**easy, epochs=6, lr=1e-2, resolution_schedule=[dict(until_epoch=2, input_size=24)]), tmp_path)
    assert result["best"]["top1"] > 60
    assert [row["input_size"] for row in load_rows(tmp_path)] == ["24", "24", "32", "32", "32", "32"]


def load_rows(folder):
    with open(folder / "history.csv", newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.mark.parametrize("stop_after", [2, 6, 8], ids=["middle-of-first", "end-of-first", "middle-of-second"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, recipe, whole, stop_after, workers):
    with pytest.raises(Interrupted, match="run the same command to resume") as stop:
        run(recipe(workers=workers), tmp_path, Stop(stop_after))
    assert stop.value.signum == signal.SIGINT
    before = json.loads(load_last(tmp_path)["progress"])
    assert before["updates"] in (stop_after, stop_after + 1)
    run(recipe(), tmp_path)
    same_state(whole, tmp_path)


@pytest.mark.parametrize("before", [False, True])
def test_a_run_resumes_in_another_memory_format(tmp_path, recipe, before):
    """A fused optimizer pairs parameters and moments by memory, so the moments must change their format, too."""
    fused = dict(opt="adamw", opt_kwargs={"fused": True}, lr=1e-3, workers=0)
    with pytest.raises(Interrupted):
        run(recipe(**fused, channels_last=before), tmp_path / "changed", Stop(6))
    run(recipe(**fused, channels_last=not before), tmp_path / "changed")
    run(recipe(**fused, channels_last=before), tmp_path / "whole")
    changed, whole = (load_last(tmp_path / name)["optimizer"]["state"] for name in ("changed", "whole"))
    kernels = [key for key in whole if whole[key]["exp_avg"].ndim == 4 and min(whole[key]["exp_avg"].shape[1:3]) > 1]
    assert kernels  # of several channels and positions
    for key in kernels:
        for name in ("exp_avg", "exp_avg_sq"):
            got, expected = changed[key][name], whole[key][name]
            assert (got - expected).norm() < 0.1 * expected.norm(), (key, name)


def test_run_with_cache_device_learns_and_resumes_bitwise(tmp_path, recipe):
    device = dict(cache="device", cache_size=32, auto_augment=None, workers=0)
    with pytest.raises(Interrupted):
        run(recipe(**device), tmp_path / "stopped", Stop(8))
    run(recipe(**device), tmp_path / "stopped")
    run(recipe(**device), tmp_path / "whole")
    same_state(tmp_path / "whole", tmp_path / "stopped")
    with pytest.raises(CheckpointError, match=r"cache: \w+ -> \w+"):
        run(recipe(**{**device, "cache": "ram"}), tmp_path / "whole")
    easy = dict(mixup=0.0, cutmix=0.0, reprob=0.0, drop_path_rate=0.0, ema_decay=None, epochs=6, lr=1e-2)
    result = run(
        recipe(**{**device, **easy}, resolution_schedule=[dict(until_epoch=2, input_size=24)]), tmp_path / "easy"
    )
    assert result["best"]["top1"] > 60
    rows = load_rows(tmp_path / "easy")
    assert [row["input_size"] for row in rows] == ["24", "24", "32", "32", "32", "32"]
    assert all(0 < float(row["data_share"]) < 1 for row in rows)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_trains_as_single_launches_do(tmp_path, recipe):
    common = dict(device="cuda", cache="device", cache_size=32, auto_augment=None, workers=0)
    for graph in (False, True):
        run(recipe(**common, cuda_graph=graph), tmp_path / str(graph))
    losses = [[float(row["train_loss"]) for row in load_rows(tmp_path / str(graph))] for graph in (False, True)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(device="cpu"), "needs one process on a CUDA device"),
        (dict(accumulate=2), "accumulate=2"),
        (dict(compile=True), "compile=True"),
        (dict(amp="float16"), "amp=float16"),
    ],
)
def test_a_cuda_graph_is_refused_where_it_cannot_be_recorded(tmp_path, recipe, fields, words):
    with pytest.raises(RecipeError, match=words):
        run(recipe(cuda_graph=True, **fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_stopping_while_validating_loses_nothing(tmp_path, recipe, whole, monkeypatch):
    class StopInValidation(Stop):
        def validating(self, step, steps):
            Stop.step(self)

        def step(self, *_):
            pass

    with pytest.raises(Interrupted):
        run(recipe(val_batch_size=4), tmp_path, StopInValidation(2))
    assert json.loads(load_last(tmp_path)["progress"])["step"] == 6
    run(recipe(), tmp_path)
    same_state(whole, tmp_path)


def test_sigterm_stops_like_ctrl_c(tmp_path, recipe):
    with pytest.raises(Interrupted) as stop:
        run(recipe(), tmp_path, Stop(1, signal.SIGTERM))
    assert stop.value.signum == signal.SIGTERM
    assert load_last(tmp_path)["model"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_half_precision_scaler_resumes_too(tmp_path, recipe):
    changes = dict(amp="bfloat16", opt="sgd", ema_decay=None, accumulate=2, clip_grad=1.0)
    run(recipe(**changes), tmp_path / "a")
    with pytest.raises(Interrupted):
        run(recipe(**changes), tmp_path / "b", Stop(3))
    assert json.loads(load_last(tmp_path / "b")["progress"])["step"] % 2 == 0  # between updates, not inside one
    run(recipe(**changes), tmp_path / "b")
    a, b = load_last(tmp_path / "a"), load_last(tmp_path / "b")
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])


def test_float16_keeps_its_scale_over_a_resume(tmp_path, recipe):
    with pytest.raises(Interrupted):
        run(recipe(amp="float16"), tmp_path, Stop(2))
    assert load_last(tmp_path)["scaler"]["scale"] > 0
    trainer = Trainer(recipe(amp="float16"), tmp_path, Place(0, 1, torch.device("cpu")), Reporter())
    assert trainer.learner.scaler.state_dict() == load_last(tmp_path)["scaler"]


def test_accumulated_batches_have_the_gradient_of_one_large_batch(tmp_path, recipe):
    plain = dict(model="test_vit", model_kwargs={"img_size": 32}, no_aug=True, mixup=0.0, cutmix=0.0, reprob=0.0)
    plain |= dict(drop_rate=0.0, drop_path_rate=0.0, opt="momentum", momentum=0.0, lr=0.1, warmup_epochs=0, epochs=1)
    plain |= dict(sched="none")
    run(recipe(**plain, batch_size=12), tmp_path / "large")
    run(recipe(**plain, batch_size=4, accumulate=3), tmp_path / "small")
    large, small = load_last(tmp_path / "large")["model"], load_last(tmp_path / "small")["model"]
    for name in large:
        assert torch.allclose(large[name], small[name], atol=1e-6), name


def test_another_recipe_is_not_mixed_into_a_run(whole, recipe):
    with pytest.raises(CheckpointError, match=r"lr: 0.003 -> 0.1.*choose another folder"):
        run(recipe(lr=0.1), whole)


def test_a_finished_run_is_not_trained_further(whole, recipe):
    before = (whole / "last.ckpt").read_bytes()
    assert run(recipe(workers=1), whole)["last"]["epoch"] == 2
    assert (whole / "last.ckpt").read_bytes() == before


@pytest.mark.parametrize("damage", ["flip", "cut", "foreign"])
def test_a_damaged_last_is_refused(tmp_path, recipe, whole, damage):
    content = bytearray((whole / "last.ckpt").read_bytes())
    content[len(content) // 2] ^= 4 if damage == "flip" else 0
    content = {"flip": content, "cut": content[:-1], "foreign": b"PK" + content}[damage]
    (tmp_path / "last.ckpt").write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        run(recipe(), tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_full_disk_costs_a_checkpoint_not_the_run(tmp_path, recipe, monkeypatch, code):
    real, calls = os.fsync, []

    def failing(handle):
        calls.append(handle)
        if 4 <= len(calls) < 9:
            raise OSError(code, os.strerror(code))
        real(handle)

    reporter = Notes()
    monkeypatch.setattr(os, "fsync", failing)
    run(recipe(checkpoint_minutes=0, val=None, epochs=1), tmp_path, reporter)
    assert any("the previous checkpoint is intact" in note for note in reporter.notes)
    assert json.loads(load_last(tmp_path)["progress"])["epoch"] == 1
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_disk_that_stays_full_ends_the_run_and_leaves_the_old_checkpoint(tmp_path, recipe, monkeypatch):
    with pytest.raises(Interrupted):
        run(recipe(), tmp_path, Stop(2))
    before = (tmp_path / "last.ckpt").read_bytes()

    def failing(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: failing(0))
        with pytest.raises((CheckpointError, OSError), match="No space left"):
            run(recipe(), tmp_path)
    assert (tmp_path / "last.ckpt").read_bytes() == before


def test_nan_stops_with_advice_and_without_a_checkpoint_of_it(tmp_path, recipe):
    with pytest.raises(DivergedError, match="lower lr"):
        run(recipe(lr=1e30, opt="sgd", warmup_epochs=0, checkpoint_minutes=0, sched="none"), tmp_path)
    if (tmp_path / "last.ckpt").exists():
        assert math.isfinite(json.loads(load_last(tmp_path)["progress"])["loss_sum"])


def test_unreadable_images_are_counted_and_skipped(tmp_path, recipe):
    draw(tmp_path / "train", 4, seed=0)
    for name in ("blue/blue_1", "red/red_0"):
        (tmp_path / "train" / f"{name}.png").write_bytes(b"?")
    reporter = Notes()
    run(recipe(train=str(tmp_path / "train"), batch_size=2, epochs=2), tmp_path / "run", reporter)
    assert sorted(note.split()[4] for note in reporter.notes) == ["blue/blue_1.png", "red/red_0.png"]
    assert load_rows(tmp_path / "run")[-1]["unreadable"] == "2"


def test_batches_in_which_every_image_is_unreadable_are_skipped(tmp_path, recipe):
    draw(tmp_path / "train", 2, seed=0)
    for path in (tmp_path / "train").rglob("*.png"):
        path.write_bytes(b"?")
    result = run(recipe(train=str(tmp_path / "train"), val=None, batch_size=2, epochs=1), tmp_path / "run", Notes())
    assert result["last"]["unreadable"] == 6


def test_classes_that_do_not_match_stop_the_run_before_it_starts(tmp_path, recipe):
    draw(tmp_path / "val", 1, seed=0, classes=("blue", "red"))
    with pytest.raises(DataError, match="only in training green"):
        run(recipe(val=str(tmp_path / "val")), tmp_path / "run")
    with pytest.raises(DataError, match="has 3 classes"):
        run(recipe(num_classes=5), tmp_path / "run")
    (tmp_path / "names.txt").write_text("blue\tsky\ngreen\tgrass\nyellow\tsun\n")
    with pytest.raises(DataError, match="is missing classes of the data: red"):
        run(recipe(class_names=str(tmp_path / "names.txt")), tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model="test_efficientnett"), "closest: test_efficientnet"),
        (dict(opt="adamv"), "optimizer 'adamv'.*closest: adam"),
        (dict(sched="cosinus"), "schedule 'cosinus'.*timm has cosine"),
        (dict(model_kwargs=dict(nonsense=1)), "nonsense"),
        (dict(freeze=["blockz"]), "freeze: 'blockz' matches no part.*closest: blocks"),
        (dict(freeze=["*"]), "leaves nothing to train"),
        (dict(train=None), "has no training data"),
        (dict(batch_size=400), "do not fill one update"),
        (dict(device="quantum"), "device 'quantum' cannot be used"),
        (dict(init="nowhere"), "init: 'nowhere' is not a folder, a file"),
    ],
)
def test_what_cannot_be_is_said_before_the_first_step(tmp_path, recipe, changes, message):
    with pytest.raises(TrainingError, match=message):
        run(recipe(**changes), tmp_path)


def test_fine_tuning_takes_the_body_and_a_new_classifier(tmp_path, recipe, whole):
    body = weights.read(whole / "best.safetensors")
    model = make_model(recipe(init=str(whole)), num_classes=7)
    state = model.state_dict()
    assert state["classifier.weight"].shape[0] == 7
    kept = [name for name in state if not name.startswith("classifier")]
    assert all(torch.equal(state[name], body[name]) for name in kept)
    same = make_model(recipe(init=str(whole / "best.safetensors")), num_classes=3).state_dict()
    assert all(torch.equal(same[name], body[name]) for name in same)


def test_fine_tuning_from_another_network_is_refused(recipe, whole):
    with pytest.raises(CheckpointError, match="does not fit this ResNet"):
        make_model(recipe(init=str(whole), model="test_resnet"), num_classes=3)


def test_frozen_stages_do_not_move_and_keep_their_statistics(tmp_path, recipe, whole):
    run(recipe(init=str(whole), freeze=["conv_stem", "bn1", "blocks.[01]"], weight_decay=0.1), tmp_path)
    before, after = weights.read(whole / "best.safetensors"), load_last(tmp_path)["model"]
    frozen = [n for n in before if n.startswith(("conv_stem", "bn1", "blocks.0.", "blocks.1."))]
    assert any("running_mean" in name for name in frozen)
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert not torch.equal(before["blocks.2.0.conv_exp.weight"], after["blocks.2.0.conv_exp.weight"])


def test_layer_decay_gives_lower_layers_smaller_rates(recipe):
    model = make_model(recipe(), 3)
    optimizer = make_optimizer(recipe(layer_decay=0.5), model)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert scale[id(model.conv_stem.weight)] < scale[id(model.blocks[2][0].conv_pwl.weight)]
    assert scale[id(model.classifier.weight)] == 1
    freeze(model, ["conv_stem"])
    left = [p for group in make_optimizer(recipe(), model).param_groups for p in group["params"]]
    assert all(p is not model.conv_stem.weight for p in left)


def test_the_average_is_what_is_validated_and_kept(tmp_path, recipe):
    run(recipe(epochs=1, ema_decay=0.99), tmp_path)
    state, best = load_last(tmp_path), weights.read(tmp_path / "best.safetensors")
    assert all(torch.equal(best[name], state["ema"][name]) for name in best)
    assert not torch.equal(state["ema"]["classifier.weight"], state["model"]["classifier.weight"])


def test_without_validation_the_latest_weights_are_the_best(tmp_path, recipe):
    run(recipe(val=None, ema_decay=None), tmp_path)
    state, best = load_last(tmp_path), weights.read(tmp_path / "best.safetensors")
    assert all(torch.equal(best[name], state["model"][name]) for name in best)


def test_an_unwritable_run_folder_is_said(tmp_path, recipe):
    (tmp_path / "file").write_text("")
    with pytest.raises(Exception, match="cannot write to the run folder"):
        run(recipe(), tmp_path / "file" / "run")


def test_curves_are_left_out_where_matplotlib_is_missing(tmp_path, recipe, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == "matplotlib" else real(n, *a))
    reporter = Notes()
    run(recipe(epochs=1), tmp_path, reporter)
    assert not (tmp_path / "curves.png").exists()
    assert any("pip install matplotlib" in note for note in reporter.notes)


def test_mixing_stops_at_its_epoch(tmp_path, recipe, monkeypatch):
    seen = []
    real = Trainer.train_epoch

    def watched(self):
        real(self)
        seen.append(self.learner.mixup.mixup_enabled)

    monkeypatch.setattr(Trainer, "train_epoch", watched)
    run(recipe(epochs=3, mixup_off_epoch=2, val=None), tmp_path)
    assert seen == [True, True, False]


def test_failed_best_checkpoint_is_retried_in_a_better_epoch(tmp_path, recipe, monkeypatch):
    from parameternet.training import checkpoint

    real, calls = checkpoint.save_weights, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(checkpoint, "save_weights", failing)
    reporter = Notes()
    run(recipe(val=None), tmp_path, reporter)  # without validation each epoch is the best
    assert any("No space left" in note for note in reporter.notes)
    assert weights.read(tmp_path / "best.safetensors")
    calls.clear()
    with pytest.raises(CheckpointError, match="Free some space"):
        run(recipe(val=None, epochs=1), tmp_path / "short", reporter)


def test_tensorboard_gets_each_epoch_where_it_is_installed(tmp_path, recipe, monkeypatch):
    import importlib.util
    import sys
    import types

    written = []

    class Writer:
        def __init__(self, folder):
            assert folder == tmp_path / "tensorboard"

        def add_scalar(self, name, value, epoch):
            written.append((name, epoch))

        def close(self):
            written.append("closed")

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: True if n == "tensorboard" else real(n, *a))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    run(recipe(epochs=1), tmp_path)
    assert {("top1", 1), ("train_loss", 1), ("lr", 1)} <= set(written[:-1])
    assert written[-1] == "closed"


def test_dynamic_network_initialises_from_its_static_baseline(tmp_path, recipe):
    plain = dict(model="parameternet_50m", drop_path_rate=0.0, drop_rate=0.0, epochs=1, model_kwargs={"dynamic": False})
    run(recipe(**plain), tmp_path / "static")
    static = make_model(recipe(**plain, init=str(tmp_path / "static")), 3).eval()
    dynamic = make_model(recipe(**{**plain, "model_kwargs": {}}, init=str(tmp_path / "static")), 3).eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(dynamic(x), static(x), atol=1e-5)
    first, second, *_ = dynamic.stem.conv.weight.unflatten(0, (4, -1))
    assert not torch.equal(first, second)  # experts that are alike would stay alike
    assert dynamic.stem.conv.routing.weight.abs().max() == 0


@pytest.mark.filterwarnings("error:a router's state dict has no temperature")
def test_a_run_keeps_the_routers_of_its_start_and_its_config_names_them(tmp_path, recipe):
    """Weights of older releases have sigmoid routers, which the network's default no longer is."""
    plain = dict(model="parameternet_50m", drop_path_rate=0.0, drop_rate=0.0, epochs=1)
    run(recipe(**plain, model_kwargs={"routing": "sigmoid"}), tmp_path / "old")
    old = make_model(recipe(**plain, init=str(tmp_path / "old")), 3).eval()
    assert old.stem.conv.routing.activation == "sigmoid"
    with pytest.raises(RecipeError, match="routing='softmax' was asked for, but the routers of"):
        make_model(recipe(**plain, init=str(tmp_path / "old"), model_kwargs={"routing": "softmax"}), 3)
    run(recipe(**plain, init=str(tmp_path / "old")), tmp_path / "new")
    with safe_open(tmp_path / "new" / "best.safetensors", "pt") as file:
        assert json.loads(file.metadata()["config"])["model_args"] == {"routing": "sigmoid"}
    place = Place(0, 1, torch.device("cpu"))
    begun, default = (
        Trainer(recipe(**plain, model_kwargs=kwargs, ema_decay=0.9), tmp_path, place, Reporter()).learner
        for kwargs in ({"routing": "sigmoid"}, {})
    )
    default.load_state_dict(begun.state_dict())
    x = torch.randn(2, 3, 32, 32)
    for ours, theirs in ((default.model, begun.model), (default.ema.module, begun.ema.module)):
        assert torch.equal(ours.eval()(x), theirs.eval()(x))
