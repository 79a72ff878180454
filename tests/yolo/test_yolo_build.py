"""Networks by name are the stock ones with other layers: the same shapes, strides and heads."""

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from ultralytics import YOLO
from ultralytics.nn import tasks
from ultralytics.nn.modules import Conv

import parameternet.yolo
from parameternet.yolo import registration, yamls
from parameternet.yolo.registration import StandIn

VARIANTS = ["dynamicconv", "dynamicconvbnact", "c2f-dynamicconv", "c2f-ghost-dynamicconv"]
FAMILIES = [name for name in ("yolov8", "yolo11", "yolo12", "yolo26") if tasks.check_yaml(f"{name}.yaml", hard=False)]
TASKS = ["", "-seg", "-pose", "-obb", "-cls"]


def build(name, **changes):
    torch.manual_seed(0)
    d = {**tasks.yaml_model_load(name), **changes}
    kind = {"-cls": tasks.ClassificationModel, "-seg": tasks.SegmentationModel, "-pose": tasks.PoseModel,
            "-obb": tasks.OBBModel}  # fmt: skip
    task = next((task for task in kind if task in name), "")
    return kind.get(task, tasks.DetectionModel)(d, verbose=False).eval()


def shapes(model, size=64):
    """What every row gives, and what it is read from."""
    seen = []

    def note(module, inputs, output):
        first = output[0] if isinstance(output, list | tuple) else output
        seen.append((module.i, module.f, tuple(first.shape) if isinstance(first, torch.Tensor) else None))

    for row in model.model:
        row.register_forward_hook(note)
    with torch.no_grad():
        model(torch.zeros(1, 3, size, size))
    return seen


def assert_like_stock(name, variant, letter):
    family, _, task = name.partition("-")
    task = f"-{task}" if task else ""
    stock, ours = (build(f"{family}{letter}{task}{suffix}.yaml") for suffix in ("", f"-{variant}"))
    assert shapes(ours) == shapes(stock)
    if task != "-cls":
        assert ours.stride.tolist() == stock.stride.tolist()
    assert type(ours.model[-1]) is type(stock.model[-1])
    if hasattr(stock.model[-1], "cv3"):  # `legacy` decides what the head is made of
        assert type(ours.model[-1].cv3[0][0]) is type(stock.model[-1].cv3[0][0])
    assert not [m for m in ours.modules() if type(type(m)) is StandIn]
    dynamic = [m for m in ours.modules() if isinstance(m, parameternet.yolo.DynamicConv)]
    assert dynamic
    for parameter in ours.parameters():
        assert parameter.ndim in (1, 2, 4)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_networks_are_shaped_like_the_stock_ones(family, task, variant):
    if not tasks.check_yaml(f"{family}{task}.yaml", hard=False):
        pytest.skip(f"this Ultralytics has no {family}{task}")
    assert_like_stock(f"{family}{task}", variant, "n")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("letter", ["s", "m", "l", "x"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scales_of_detectors(family, letter, variant):
    assert_like_stock(family, variant, letter)


@pytest.mark.parametrize(("letter", "variant"), list(zip(["s", "m", "l", "x"], VARIANTS, strict=True)))
@pytest.mark.parametrize("task", TASKS[1:])
@pytest.mark.parametrize("family", FAMILIES)
def test_scales_of_other_tasks(family, task, letter, variant):
    if not tasks.check_yaml(f"{family}{task}.yaml", hard=False):
        pytest.skip(f"this Ultralytics has no {family}{task}")
    assert_like_stock(f"{family}{task}", variant, letter)


def test_the_article_s_first_network_row_by_row():
    rows = [row[2] for part in ("backbone", "head") for row in tasks.yaml_model_load("yolov8n-dynamicconv.yaml")[part]]
    assert rows[:8] == ["Conv", "DynamicConv", "C2f", "DynamicConv", "C2f", "DynamicConv", "C2f", "DynamicConv"]
    assert rows.count("DynamicConv") == 6 and rows.count("Conv") == 1


@pytest.mark.parametrize(
    ("name", "letter"),
    [("parameternet_50m", "n"), ("resnet18", "n"), ("dynamic_efficientnet_lite0", "s"), ("convnext_atto", "n"),
     ("swin_tiny_patch4_window7_224", "n"), ("dynamic_ghostnetv2_100", "n"), ("parameternet_300m", "n")],
)  # fmt: skip
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "yolo12"])
def test_any_network_of_timm_under_any_head(family, name, letter):
    model = build(f"{family}{letter}-{name}.yaml")
    assert model.stride.tolist() == [8, 16, 32]
    stock = build(f"{family}{letter}.yaml")
    assert type(model.model[-1]) is type(stock.model[-1])
    with torch.no_grad():
        for size in ((64, 96), (96, 64)):
            assert model(torch.zeros(2, 3, *size))[0].shape[0] == 2


# Rows -----------------------------------------------------------------------------------------------------------------


def parse(rows, ch=3, **d):
    return tasks.parse_model({"nc": 2, "scale": "n", "backbone": rows, "head": [], **d}, ch, verbose=False)[0]


def test_options_at_the_end_of_a_row():
    conv, block, twin = parse(
        [
            [-1, 1, "DynamicConv", [32, 3, 2, {"num_experts": 3, "routing": "softmax"}]],
            [-1, 2, "C2f_DynamicConv", [32, True, {"num_experts": 2}]],
            [-1, 2, "C3k2_DynamicConv", [32, False, 0.25, {"num_experts": 5}]],
        ]
    )
    assert conv.num_experts == 3 and conv.routing.softmax
    assert {m.num_experts for m in block.modules() if hasattr(m, "num_experts")} == {2}
    assert {m.num_experts for m in twin.modules() if hasattr(m, "num_experts")} == {5}
    assert type(twin) is parameternet.yolo.C3k2_DynamicConv and twin.type == "parameternet.yolo.C3k2_DynamicConv"
    assert conv.type == "parameternet.yolo.DynamicConv"


def test_every_layer_stands_in_a_yaml():
    rows = [
        [-1, 1, "GhostModule", [32, 3, 2]],
        [-1, 1, "GhostBottleneck_DynamicConv", [32, 5, 2]],
        [-1, 1, "C3k_DynamicConv", [32]],
        [-1, 1, "C2f_GhostModule_DynamicConv", [48]],
        [-1, 2, "C3k2_GhostModule_DynamicConv", [48, False]],
        [-1, 1, "DynamicConvBnAct", [8, 1]],
    ]
    assert parse(rows)(torch.zeros(2, 3, 32, 32)).shape == (2, 8, 8, 8)


def test_the_activation_of_the_network_is_ours_too():
    before = Conv.default_act
    try:
        model = build("yolov8n-c2f-dynamicconv.yaml", activation="torch.nn.ReLU()")
    finally:
        Conv.default_act = before
    acts = {type(m.act) for m in model.modules() if isinstance(m, parameternet.yolo.DynamicConvBnAct)}
    assert acts == {nn.ReLU}


def test_other_channels_and_where_rows_must_be():
    assert parse([[-1, 1, "TimmBackbone", ["resnet18"]], [0, 1, "TimmStage", [16]]], ch=4)[0].net.conv1.in_channels == 4
    with pytest.raises(ValueError, match="TimmStage in row 1 reads row 0, which is not a TimmBackbone"):
        parse([[-1, 1, "Conv", [8]], [0, 1, "TimmStage", [8]]])
    with pytest.raises(ValueError, match="no feature of stride 64; there are 2, 4, 8, 16, 32"):
        parse([[-1, 1, "TimmBackbone", ["resnet18"]], [0, 1, "TimmStage", [64]]])


@pytest.mark.parametrize("name", ["coatnet_0_224", "maxvit_rmlp_pico_rw_256", "not_a_network"])
def test_networks_that_a_detector_cannot_use_are_refused_by_name(name):
    with pytest.raises(ValueError, match=name):
        parse([[-1, 1, "TimmBackbone", [name]], [0, 1, "TimmStage", [8]]])


def test_looking_at_a_backbone_draws_no_random_number():
    rows = [[-1, 1, "Conv", [8, 3, 2]], [-1, 1, "Conv", [8, 3, 2]]]
    yolo = [[-1, 1, "TimmBackbone", ["resnet10t"]], [0, 1, "TimmStage", [32]]]
    torch.manual_seed(0)
    parse(rows)
    after = torch.rand(1)
    registration.backbone.cached_features.cache_clear()
    torch.manual_seed(0)
    registration.write_features([[*row[:3], list(row[3])] for row in yolo], 3)
    parse(rows)
    assert torch.equal(torch.rand(1), after)


# Registration ---------------------------------------------------------------------------------------------------------


def test_registering_again_reloading_and_threads_change_nothing():
    import importlib

    before = tasks.parse_model
    threads = [threading.Thread(target=parameternet.yolo.register) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    importlib.reload(parameternet.yolo)
    assert tasks.parse_model is before
    assert not hasattr(tasks.parse_model.__wrapped__, "of_parameternet")
    build("yolov8n-dynamicconv.yaml")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("tasks.DynamicConv = object", "has a layer of its own named DynamicConv"),
        ("original = tasks.parse_model; tasks.parse_model = lambda d, ch, verbose=True: original(d, 5, verbose)",
         "does not fit Ultralytics"),
        ("tasks.parse_model = lambda *_: 1 / 0", "does not fit Ultralytics .*division by zero"),
    ],
)  # fmt: skip
def test_incompatible_ultralytics_is_an_import_error(damage, message):
    code = f"from ultralytics.nn import tasks\n{damage}\nimport parameternet.yolo"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    import re

    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ") and re.search(message, last)


def test_the_plain_import_knows_everything_afterwards():
    assert parameternet.yolo.YOLO is YOLO
    assert YOLO("yolov8n-dynamicconv.yaml").task == "detect"
    assert YOLO("yolo11n-seg-dynamicconv.yaml").task == "segment"


def test_yamls_of_the_user_come_first_and_paths_stay_literal(tmp_path, monkeypatch):
    own = tmp_path / "run3n" / "yolov8-own.yaml"
    own.parent.mkdir()
    d = {"nc": 3, "scales": {"n": [0.33, 0.25, 1024]}, "backbone": [[-1, 1, "DynamicConv", [64, 3, 2]]],
         "head": [[-1, 1, "Conv", [64, 1]]]}  # fmt: skip
    own.write_text(yaml.safe_dump(d))
    assert tasks.yaml_model_load(own)["nc"] == 3
    monkeypatch.chdir(tmp_path)
    (tmp_path / "yolov8-dynamicconv.yaml").write_text(yaml.safe_dump({**d, "nc": 4}))
    assert tasks.yaml_model_load("yolov8n-dynamicconv.yaml")["nc"] == 4


def test_only_names_that_are_ours_are_made():
    def stock(name):
        return tasks.check_yaml(name, hard=False)

    assert yamls.find("yolov8.yaml", stock) is None
    assert yamls.find("yolov8-p2.yaml", stock) is None
    assert yamls.find("yolov8-nonsense.yaml", stock) is None
    assert yamls.find("some/yolov8-dynamicconv.yaml", stock) is None
    assert yamls.find("yolov8-dynamicconv.yaml", stock).endswith("yolov8-dynamicconv.yaml")


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yamls.folder_of_this_process.cache_clear()
    return tmp_path


def written(name="yolov8-dynamicconv.yaml"):
    path = Path(yamls.find(name, lambda stock: tasks.check_yaml(stock, hard=False)))
    assert yaml.safe_load(path.read_text())["backbone"][1][2] == "DynamicConv"
    return path


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs users")
@pytest.mark.parametrize("shared", ["parameternet-yolo", None])
def test_yamls_of_two_users_do_not_meet(temporary, monkeypatch, shared):
    first = written()
    assert first.parent.stat().st_mode & 0o777 == 0o700 and written() == first
    if shared:  # the folder of 0.1.0, which belongs to whoever came first
        (temporary / shared).mkdir(mode=0o500)
    me = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: me + 1)
    assert written().parent != first.parent


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs users")
@pytest.mark.parametrize("trap", ["another user's", "writable by all", "link", "file"])
def test_a_folder_that_others_can_write_to_is_not_used(temporary, monkeypatch, trap):
    folder = temporary / f"parameternet-yolo-{os.getuid()}"
    (temporary / "elsewhere").mkdir()
    if trap == "link":
        folder.symlink_to(temporary / "elsewhere")
    elif trap == "file":
        folder.touch()
    else:
        folder.mkdir()
    if trap == "writable by all":
        folder.chmod(0o777)
    if trap == "another user's":
        me = os.getuid()
        folder.rename(temporary / f"parameternet-yolo-{me + 1}")
        monkeypatch.setattr(os, "getuid", lambda: me + 1)
    path = written()
    assert path.parent.parent == temporary and path.parent != folder
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert not list((temporary / "elsewhere").iterdir())
    assert written() == path


def test_nothing_else_imports_it():
    code = "import sys, parameternet, parameternet.cli; print('ultralytics' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
