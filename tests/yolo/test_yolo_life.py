"""From building to a retrained checkpoint in a process that never heard of us."""

import copy
import io
import os
import pickle
import pickletools
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from lively import lively
from torch import nn
from ultralytics import YOLO
from ultralytics.nn import tasks
from ultralytics.nn.modules import Conv
from ultralytics.utils import dist
from ultralytics.utils.torch_utils import ModelEMA, get_flops

import parameternet
import parameternet.yolo
from parameternet.layers import Router
from parameternet.weights import WeightsDamaged
from parameternet.yolo import DynamicConv, TimmBackbone, registration

NAMES = ["yolov8n-dynamicconv", "yolov8n-dynamicconvbnact", "yolo11n-c2f-dynamicconv", "yolov8n-c2f-ghost-dynamicconv",
         "yolov8n-parameternet_50m"]  # fmt: skip
SMALL = {"imgsz": 64, "batch": 4, "workers": 0, "plots": False, "epochs": 1, "verbose": False, "device": "cpu"}


def outputs(model, x):
    with torch.no_grad():
        y = model.eval()(x)
    return y[0] if isinstance(y, tuple | list) else y


def close(a, b, tolerance=1e-4):
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())


def network(name):
    return lively(YOLO(f"{name}.yaml").model.eval())


def fresh(code, code_of_exit=0, **environment):
    """Run code in a process that imported nothing of ours."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == code_of_exit, done.stdout + done.stderr
    return done.stdout + done.stderr


# Fusing and counting --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [False, True])
def test_fuse_folds_our_batch_norm_once_and_exactly(name, training):
    model = network(name)
    x = torch.rand(2, 3, 64, 64)
    expected = outputs(model, x)
    fused = copy.deepcopy(model).train(training).fuse(verbose=False)
    assert close(outputs(fused, x), expected)
    assert close(outputs(fused.fuse(verbose=False), x), expected)
    left = [n for n, m in fused.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert not left
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


@pytest.mark.parametrize("scale", ["n", "s"])
@pytest.mark.parametrize("variant", ["dynamicconv", "dynamicconvbnact", "c2f-dynamicconv"])
def test_gflops_are_those_of_the_convolutions(scale, variant):
    stock, ours = (YOLO(f"yolov8{scale}{suffix}.yaml").model for suffix in ("", f"-{variant}"))
    theirs, mine = (get_flops(model.eval(), 640) for model in (stock, ours))
    assert theirs > 0 and 0.99 < mine / theirs < 1.01
    assert parameternet.count_flops(ours, (3, 64, 64)).mixing == sum(
        m.weight.numel() for m in ours.modules() if isinstance(m, DynamicConv)
    )


# Parameters, copies, averages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_tensors_are_what_optimizers_and_averages_expect(name):
    model = network(name)
    assert {p.ndim for p in model.parameters()} <= {1, 2, 4}
    two = [n for n, p in model.named_parameters() if p.ndim == 2]
    assert all(".routing." in n or n.endswith("classifier.weight") for n in two)
    whole = [n for n, b in model.named_buffers() if not b.is_floating_point() and "num_batches_tracked" not in n]
    assert not whole
    x = torch.rand(1, 3, 64, 64)
    expected = outputs(model, x)
    model = model.to(memory_format=torch.channels_last)
    assert close(outputs(model, x.to(memory_format=torch.channels_last)), expected)


def test_averages_see_every_tensor_of_ours():
    model = network("yolov8n-dynamicconvbnact")
    ema = ModelEMA(model, decay=0.5, tau=1)
    before = {name: value.clone() for name, value in ema.ema.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    ema.update(model)
    same = [n for n, v in ema.ema.state_dict().items() if v.is_floating_point() and torch.equal(v, before[n])
            and n in dict(model.named_parameters())]  # fmt: skip
    assert same in ([], ["model.22.dfl.conv.weight"])


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_and_autocast(name):
    model = network(name)
    x = torch.rand(2, 3, 64, 64)
    expected = outputs(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert close(outputs(model, x).float(), expected, 0.1)
    assert close(outputs(copy.deepcopy(model).bfloat16(), x.bfloat16()).float(), expected, 0.1)


# A backbone of timm ---------------------------------------------------------------------------------------------------


def test_a_backbone_travels_by_name_and_tensors():
    backbone = lively(TimmBackbone(3, {"name": "resnet10t", "out_indices": [2, 4]})).train()
    next(iter(backbone.net.parameters())).requires_grad_(False)
    x = torch.rand(2, 3, 64, 64)
    expected = [f.detach() for f in copy.deepcopy(backbone).eval()(x)]
    for travelled in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        assert travelled.training and travelled.net.training
        assert [p.requires_grad for p in travelled.parameters()] == [p.requires_grad for p in backbone.parameters()]
        assert all(close(a, b) for a, b in zip(travelled.eval()(x), expected, strict=True))
    half = pickle.loads(pickle.dumps(copy.deepcopy(backbone).half()))
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    names = {a for op, a, _ in pickletools.genops(pickle.dumps(backbone, protocol=2)) if op.name == "GLOBAL"}
    assert not [name for name in names if name.startswith("timm")]


def test_a_backbone_keeps_its_eps_and_knows_mean_and_std():
    import timm

    model = YOLO("yolov8n-resnet10t.yaml").model
    backbone = model.model[0]
    assert {m.eps for m in backbone.net.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-5}
    assert {m.eps for m in model.model[1:].modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}
    plain = timm.create_model("resnet10t", features_only=True, out_indices=(2, 3, 4)).eval()
    plain.load_state_dict(backbone.net.state_dict())
    x = torch.rand(1, 3, 64, 64)
    mean, std = (torch.tensor(backbone.net.pretrained_cfg[k])[:, None, None] for k in ("mean", "std"))
    for a, b in zip(backbone.eval()(x), plain((x - mean) / std), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_channels_last_families_are_turned():
    backbone = TimmBackbone(3, {"name": "swin_tiny_patch4_window7_224", "out_indices": [1, 3]}).eval()
    with torch.no_grad():
        shapes = [tuple(f.shape) for f in backbone(torch.rand(1, 3, 64, 96))]
    assert shapes == [(1, 192, 8, 12), (1, 768, 2, 3)]
    assert all(f.is_contiguous() for f in backbone(torch.rand(1, 3, 64, 64)))


def test_pretrained_weights_are_asked_for_once(monkeypatch):
    import timm

    asked = []
    original = timm.create_model

    def create(*args, pretrained=False, **kwargs):
        asked.append(pretrained)
        return original(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", create)
    spec = {"name": "resnet10t", "pretrained": True, "out_indices": [3]}
    first = TimmBackbone(3, spec)
    second = TimmBackbone(3, spec)
    assert asked.count(True) == 1
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    from parameternet.yolo import backbone

    data = pickle.dumps(first)
    monkeypatch.setattr(backbone, "_SEEN", {})  # another process, which begins with the checkpoint
    pickle.loads(data)
    TimmBackbone(3, spec)
    assert asked.count(True) == 1


# Starting from dense weights ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "exact"), [("dynamicconvbnact", True), ("c2f-dynamicconv", True), ("dynamicconv", False)]
)
@pytest.mark.parametrize("family", ["yolov8", "yolo11"])
def test_stock_weights_fill_dynamic_layers(tmp_path, family, variant, exact):
    stock = YOLO(f"{family}n.yaml")
    lively(stock.model.eval())
    stock.save(tmp_path / "stock.pt")
    ours = YOLO(f"{family}n-{variant}.yaml").load(tmp_path / "stock.pt")
    x = torch.rand(1, 3, 64, 64)
    if exact:
        assert close(outputs(ours.model, x), outputs(stock.model.float(), x))
    bare = [m for m in ours.model.modules() if isinstance(m, DynamicConv)]
    assert bare and all(m.routing.weight.abs().sum() == 0 for m in bare)
    own, dense = ours.model.state_dict(), stock.model.state_dict()
    conv = next(n for n, m in ours.model.named_modules() if isinstance(m, DynamicConv))
    kernel = own[f"{conv}.weight"].unflatten(0, (4, -1)).mean(0)
    if exact:
        assert close(kernel, dense[f"{conv}.weight"], 1e-3)  # the file is in half precision
    else:
        norm = {k: dense[f"{conv}.bn.{k}"] for k in ("weight", "running_var")}
        scale = norm["weight"] / (norm["running_var"] + 1e-3).sqrt()
        assert close(kernel, dense[f"{conv}.conv.weight"] * scale[:, None, None, None], 1e-3)


def test_upcycle_does_the_same_without_a_yaml():
    stock = lively(YOLO("yolov8n.yaml").model.eval())
    dynamic = parameternet.upcycle(stock, exclude="model.22.*", probe=torch.zeros(1, 3, 64, 64))
    x = torch.rand(1, 3, 64, 64)
    assert close(outputs(dynamic, x), outputs(stock, x))
    assert dynamic.upcycling.layers[0].left == "the stem" and len(dynamic.upcycling.converted) > 40


# Checkpoints ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    """A checkpoint of each kind after one epoch, by Ultralytics' own trainer."""
    made = {}
    for name in ("yolov8n-dynamicconv", "yolo11n-c2f-dynamicconv", "yolov8n-parameternet_50m"):
        folder = tmp_path_factory.mktemp(name)
        model = YOLO(f"{name}.yaml")
        model.train(data=str(data), project=str(folder), name="run", **SMALL)
        made[name] = folder / "run" / "weights" / "last.pt"
        assert made[name].is_file()
    return made


def test_a_checkpoint_names_only_what_we_list(trained):
    ours = {f"{cls.__module__} {cls.__qualname__}" for cls in registration.PICKLED}
    for path in trained.values():
        with zipfile.ZipFile(path) as archive:
            data = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        names = {a for op, a, _ in pickletools.genops(io.BytesIO(data)) if op.name == "GLOBAL"}
        mine = {name for name in names if name.startswith(("parameternet", "timm"))}
        assert mine and mine <= ours


@pytest.mark.parametrize("name", ["yolov8n-dynamicconv", "yolo11n-c2f-dynamicconv", "yolov8n-parameternet_50m"])
def test_checkpoint_works_in_a_process_without_our_imports(trained, data, tmp_path, name):
    picture = data.parent / "images" / "val" / "0.png"
    words = fresh(
        "from ultralytics import YOLO\n"
        f"model = YOLO(r'{trained[name]}')\n"
        f"print('boxes', len(model.predict(r'{picture}', imgsz=64, conf=0.0, verbose=False)[0].boxes) > 0)\n"
        f"print('seen', model.val(data=r'{data}', imgsz=64, plots=False, workers=0, device='cpu', verbose=False, "
        f"project=r'{tmp_path}').nt_per_class.tolist())\n"
        f"model.train(data=r'{data}', project=r'{tmp_path}', name='again', imgsz=64, batch=4, workers=0, plots=False, "
        "epochs=1, device='cpu', verbose=False)\n"
        "import torch\n"
        "print('whole', all(torch.isfinite(p).all() for p in model.model.parameters()))\n"
    )
    assert "boxes True" in words and "seen [3, 3]" in words and "whole True" in words


@pytest.mark.parametrize("name", ["yolov8n-dynamicconv", "yolo11n-c2f-dynamicconv", "yolov8n-parameternet_50m"])
def test_the_best_checkpoint_says_the_same_in_another_process(trained, tmp_path, name):
    best = trained[name].with_name("best.pt")
    x = torch.rand(2, 3, 64, 64)
    torch.save((x, outputs(YOLO(best).model.float(), x)), tmp_path / "answer.pt")
    words = fresh(
        "import parameternet.yolo, torch\nfrom ultralytics import YOLO\n"
        f"x, expected = torch.load(r'{tmp_path / 'answer.pt'}')\nmodel = YOLO(r'{best}').model.float().eval()\n"
        "with torch.no_grad():\n"
        "    print('same', torch.allclose(model(x)[0], expected, rtol=1e-4, atol=1e-4))\n"
        "    print('fused', torch.allclose(model.fuse(verbose=False)(x)[0], expected, rtol=1e-3, atol=1e-2))"
    )
    assert "same True" in words and "fused True" in words


@pytest.mark.parametrize("fused", [False, True], ids=["as-trained", "fused"])
@pytest.mark.parametrize("name", NAMES)
def test_networks_copy_and_travel(tmp_path, name, fused):
    model = network(name)
    model = model.fuse(verbose=False) if fused else model
    x = torch.rand(1, 3, 64, 64)
    expected = outputs(model, x)
    torch.save({"model": copy.deepcopy(model), "x": x, "expected": expected}, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)["model"]
    for other in (copy.deepcopy(model), loaded, copy.deepcopy(loaded), pickle.loads(pickle.dumps(model))):
        assert close(outputs(other, x), expected, 1e-6)
        for ours, theirs in zip(other.model, model.model, strict=True):
            assert (ours.i, ours.f, ours.type, ours.np) == (theirs.i, theirs.f, theirs.type, theirs.np)
        assert close(outputs(other.fuse(verbose=False), x), expected)
    assert close(outputs(model, x), expected, 1e-6)
    words = fresh(
        f"import torch\nfound = torch.load(r'{tmp_path / 'model.pt'}', weights_only=False)\n"
        "with torch.no_grad():\n    y = found['model'].eval()(found['x'])\n"
        "print('same', torch.allclose(y[0], found['expected'], rtol=1e-4, atol=1e-4))"
    )
    assert "same True" in words


def test_resume(trained, data, tmp_path):
    model = YOLO("yolov8n-dynamicconvbnact.yaml")

    def stop(trainer):
        if trainer.epoch == 0:
            raise KeyboardInterrupt

    model.add_callback("on_model_save", stop)
    with pytest.raises(KeyboardInterrupt):
        model.train(data=str(data), project=str(tmp_path), name="run", **{**SMALL, "epochs": 2})
    again = YOLO(tmp_path / "run" / "weights" / "last.pt")
    again.train(resume=True)
    assert (tmp_path / "run" / "results.csv").read_text().count("\n") == 3


def test_restricted_loading_works_once_we_are_imported(trained):
    if not hasattr(tasks, "_SafeLoad"):
        pytest.skip("this Ultralytics has no restricted loading")
    for path in trained.values():
        words = fresh(
            f"import parameternet.yolo\nfrom ultralytics import YOLO\nprint(YOLO(r'{path}').task)",
            ULTRALYTICS_SAFE_LOAD="1",
        )
        assert "detect" in words


def test_without_us_the_error_names_us(trained, tmp_path):
    # A meta path finder that hides the package, as if it were not installed.
    code = (
        "import sys\n"
        "class Hide:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'parameternet':\n"
        '            raise ModuleNotFoundError(f"No module named {name!r}", name=name)\n'
        "sys.meta_path.insert(0, Hide())\n"
        f"from ultralytics import YOLO\nYOLO(r'{trained['yolov8n-dynamicconv']}')"
    )
    assert "parameternet" in fresh(code, 1)


# Training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["yolov8n-dynamicconv", "yolov8n-c2f-ghost-dynamicconv"])
def test_the_articles_training_call(data, tmp_path, name):
    model = YOLO(f"{name}.yaml")
    model.train(
        data=str(data), cache=False, imgsz=64, epochs=2, single_cls=False, batch=4, close_mosaic=10, workers=0,
        device="cpu", optimizer="SGD", amp=False, project=str(tmp_path), name="exp", plots=False, verbose=False,
    )  # fmt: skip
    assert (tmp_path / "exp" / "weights" / "best.pt").is_file()


@pytest.mark.parametrize(
    "changes", [{"batch": 5, "imgsz": 96, "multi_scale": 0.25}, {"freeze": 5}, {"cos_lr": True, "amp": True}], ids=str
)
def test_last_batches_of_one_sizes_freezing_and_mixed_precision(data, tmp_path, changes):
    model = YOLO("yolov8n-dynamicconvbnact.yaml")
    if isinstance(changes.get("multi_scale"), float) and parameternet.yolo.registration.__version__ < "8.4":
        changes = {**changes, "multi_scale": True}
    model.train(data=str(data), project=str(tmp_path), name="run", **{**SMALL, **changes})
    assert all(torch.isfinite(p).all() for p in model.model.parameters())


def test_stock_weights_survive_training_which_builds_anew(data, tmp_path):
    stock = YOLO("yolov8n.yaml")
    lively(stock.model.eval())
    stock.save(tmp_path / "stock.pt")
    model = YOLO("yolov8n-dynamicconvbnact.yaml").load(tmp_path / "stock.pt")
    model.train(data=str(data), project=str(tmp_path), name="run", lr0=1e-9, warmup_epochs=0, optimizer="SGD", **SMALL)
    before = stock.model.state_dict()["model.1.conv.weight"].float()
    after = YOLO(tmp_path / "run" / "weights" / "last.pt").model.float().state_dict()["model.1.conv.weight"]
    kernel = after.unflatten(0, (4, -1)).mean(0)
    assert close(kernel, before, 5e-3)  # checkpoints are in half precision


def test_workers_of_a_distributed_run_know_our_layers(data, tmp_path):
    from ultralytics.models.yolo.detect import DetectionTrainer

    trainer = DetectionTrainer(
        overrides={
            "model": "yolov8n-dynamicconv.yaml",
            "data": str(data),
            "project": str(tmp_path),
            "name": "run",
            **SMALL,
        }
    )
    file = dist.generate_ddp_file(trainer)
    try:
        assert Path(file).read_text().startswith("import parameternet.yolo")
        done = subprocess.run(
            [sys.executable, file], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr[-3000:]
    finally:
        os.remove(file)


def test_the_command_knows_our_names(data, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", "from parameternet.yolo.command import main; main()", "detect", "train",
         "model=yolov8n-dynamicconv.yaml", f"data={data}", f"project={tmp_path}", "name=run", "imgsz=64", "batch=4",
         "workers=0", "plots=False", "epochs=1", "device=cpu", "verbose=False"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "weights" / "last.pt").is_file()


def test_routers_run_in_full_precision_and_conv_classes_are_disjoint():
    model = network("yolov8n-dynamicconvbnact")
    assert not [m for m in model.modules() if isinstance(m, DynamicConv) and isinstance(m, Conv)]
    assert {Conv: 1}.get(type(model.model[1])) is None
    router = next(m for m in model.modules() if isinstance(m, Router))
    assert router.half()(torch.rand(1, router.in_features, 4, 4).half()).dtype == torch.float32


def test_a_classifier_of_ours_fills_the_backbone_of_a_detector():
    import timm

    classifier = lively(timm.create_model("yolov8n_c2f_dynamicconv", num_classes=3))
    detector = YOLO("yolov8n-c2f-dynamicconv.yaml").model
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    detector.load(classifier)
    after, given = detector.state_dict(), classifier.state_dict()
    for name, value in after.items():
        in_backbone = int(name.split(".")[1]) < 10
        assert torch.equal(value, given[name] if in_backbone else before[name]), name
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = classifier.eval().forward_features(x)
        assert torch.allclose(detector.eval().model[:10](x), expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*has no digest")  # the file is of another program
@pytest.mark.parametrize("kind", ["yolov8n_c2f_dynamicconv", "parameternet_50m", "dynamic_ghostnetv2_100"])
def test_a_file_of_a_classifier_fills_the_backbone_and_survives_training(data, tmp_path, kind):
    import timm
    from safetensors.torch import save_file

    classifier = lively(timm.create_model(kind, num_classes=3))
    file = tmp_path / "best.safetensors"
    save_file({name: value.contiguous() for name, value in classifier.state_dict().items()}, file)
    detector = YOLO(f"{kind.replace('_c2f_', '-c2f-') if 'yolo' in kind else f'yolov8n-{kind}'}.yaml").load(file)
    given = {n.replace("_", "."): value for n, value in classifier.state_dict().items()}
    prefix = "" if "yolo" in kind else "model.0.net."
    name = next(n for n in detector.model.state_dict() if n.startswith(prefix) and n.endswith("routing.weight"))
    expected = given[name.removeprefix(prefix).replace("_", ".")]
    assert torch.equal(detector.model.state_dict()[name], expected)
    detector.train(
        data=str(data), project=str(tmp_path), name="run", lr0=1e-9, warmup_epochs=0, optimizer="SGD", **SMALL
    )
    after = YOLO(tmp_path / "run" / "weights" / "last.pt").model.float().state_dict()[name]
    assert close(after, expected, 5e-3)  # checkpoints are in half precision


def test_a_missing_or_damaged_file_of_weights_is_an_error(tmp_path):
    detector = YOLO("yolov8n-dynamicconv.yaml")
    before = {name: value.clone() for name, value in detector.model.state_dict().items()}
    with pytest.raises(FileNotFoundError):
        detector.load(tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
    with pytest.raises(WeightsDamaged, match=r"bad\.safetensors .* is not a complete safetensors file"):
        detector.load(tmp_path / "bad.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in detector.model.state_dict().items())


def test_hidden_head_layers_are_loaded_if_classes_differ(tmp_path):
    stock = YOLO("yolov8n.yaml")
    lively(stock.model.eval())
    stock.save(tmp_path / "stock.pt")
    if registration.__version__ < "8.4":
        pytest.skip("this Ultralytics leaves them behind for stock networks too")
    heads = []
    for name in ("yolov8n", "yolov8n-dynamicconvbnact"):
        d = {**tasks.yaml_model_load(f"{name}.yaml"), "nc": 2}
        model = tasks.DetectionModel(d, verbose=False)
        model.load(YOLO(tmp_path / "stock.pt").model)
        heads.append(model.state_dict()["model.22.cv3.0.0.conv.weight"])
    assert heads[0].shape == heads[1].shape and torch.equal(*heads)
