"""Files of weights into detectors: verified, by any name that they have ever had, and never silently nothing."""

import warnings

import pytest
import timm
import torch
from hub.server import Hub, connect
from lively import lively
from safetensors.torch import save
from ultralytics import YOLO
from ultralytics.nn import tasks

import parameternet
from parameternet import DynamicConv, weights

NAME = "parameternet_50m.tin200"
# Today's names of the stem -> those of 0.1.0.
FORMER = {"stem.conv.": "conv_stem.", "stem.bn1.": "bn1."}


@pytest.fixture(scope="module")
def classifier():
    return lively(timm.create_model("parameternet_50m", num_classes=3))


@pytest.fixture(scope="module")
def file(classifier, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / weights.FILE_NAME
    weights.save(classifier.state_dict(), path)
    return path


@pytest.fixture
def detector():
    return YOLO("yolov8n-parameternet_50m.yaml")


def state(detector):
    return {name: value.clone() for name, value in detector.model.state_dict().items()}


def transferred(detector, tensors):
    """How many tensors of the backbone are, bit for bit, those of a classifier."""
    given = {name.replace("_", "."): value for name, value in tensors.items()}
    own = detector.model.model[0].net.state_dict()
    same = [name for name, value in own.items() if torch.equal(value, given[name.replace("_", ".")].to(value.dtype))]
    assert len(same) == len(own)
    return len(same)


def flip(data):
    return data[:-100] + bytes([data[-100] ^ 4]) + data[-99:]


DAMAGES = {
    "flipped-bit": flip,
    "cut-short": lambda data: data[: len(data) // 2],
    "junk": lambda data: data + b"junk",
    "empty": lambda data: b"",
    "text": lambda data: b"no tensors",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("way", ["file", "path", "upper", "local-dir"])
def test_a_damaged_file_is_refused_and_changes_nothing(detector, file, tmp_path, damage, way):
    bad = tmp_path / ("model.SAFETENSORS" if way == "upper" else weights.FILE_NAME)
    bad.write_bytes(damage(file.read_bytes()))
    before = state(detector)
    source = {"file": str(bad), "path": bad, "upper": str(bad), "local-dir": f"local-dir:{tmp_path}"}[way]
    with pytest.raises(weights.WeightsDamaged):
        detector.load(source)
    assert all(torch.equal(value, before[name]) for name, value in detector.model.state_dict().items())


def test_training_on_a_damaged_file_is_refused(detector, file, data, tmp_path):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(flip(file.read_bytes()))
    with pytest.raises(weights.WeightsDamaged):
        detector.train(data=str(data), pretrained=str(bad), project=str(tmp_path), epochs=1, imgsz=64, device="cpu")


def test_a_damaged_copy_of_a_recorded_checkpoint_is_refused(detector, tmp_path, monkeypatch):
    (tmp_path / NAME).mkdir()
    good = weights.find(NAME).read_bytes()
    (tmp_path / NAME / weights.FILE_NAME).write_bytes(flip(good))
    monkeypatch.setenv("PARAMETERNET_WEIGHTS", str(tmp_path))
    with pytest.raises(weights.WeightsDamaged):
        detector.load(NAME)


def test_a_pickle_under_the_name_of_safetensors_says_how_to_convert_it(detector, classifier, tmp_path):
    torch.save(classifier.state_dict(), tmp_path / "best.safetensors")
    with pytest.raises(weights.WeightsError, match="pickle"):
        detector.load(tmp_path / "best.safetensors")


def test_a_missing_file_is_the_error_of_both_libraries(detector):
    for error in (FileNotFoundError, weights.WeightsNotFound):
        with pytest.raises(error, match=r"none\.safetensors"):
            detector.load("none.safetensors")


@pytest.mark.parametrize("way", ["name", "file", "local-dir"])
def test_the_shipped_checkpoint_fills_the_backbone(detector, way, tmp_path, monkeypatch):
    path = weights.find(NAME)
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir()  # a folder of that name is not the recorded checkpoint
    detector.load({"name": NAME, "file": path, "local-dir": f"local-dir:{path.parent}"}[way])
    assert transferred(detector, weights.read(path)) == 652


KINDS = ("checkpoint", "architecture", "run", "folder", "file", "local-dir", "hf-hub", "hf-hub@")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_source_fills_the_backbone(kind, detector, tmp_path, monkeypatch):
    good = weights.find(NAME).parent
    run = tmp_path / "run"
    run.mkdir()
    config = (good / weights.CONFIG_NAME).read_text()
    weights.save(weights.read(good / weights.FILE_NAME), run / "best.safetensors", {"config": config})
    for name in (NAME, "parameternet_50m"):  # folders of these names are not the recorded checkpoint
        (tmp_path / "here" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    texts = {"checkpoint": NAME, "architecture": "parameternet_50m", "run": run, "folder": str(good),
             "file": run / "best.safetensors", "local-dir": f"local-dir:{good}",
             "hf-hub": "hf-hub:somebody/net", "hf-hub@": "hf-hub:somebody/net@main"}  # fmt: skip
    with Hub() as hub:
        connect(hub, monkeypatch, tmp_path / "cache")
        hub.put("somebody/net", good)
        detector.load(texts[kind])
    assert transferred(detector, weights.read(good / weights.FILE_NAME)) == 652


def test_an_upcycled_checkpoint_and_its_dense_network_fill_the_backbone(tmp_path, monkeypatch):
    dense = lively(timm.create_model("ghostnet_100"))
    with Hub() as hub:
        connect(hub, monkeypatch, tmp_path / "cache")
        hub.put("timm/ghostnet_100.in1k", {weights.FILE_NAME: save(dense.state_dict())})
        names = ("dynamic_ghostnet_100.in1k_upcycled", "dynamic_ghostnet_100", "ghostnet_100.in1k", "ghostnet_100")
        loaded = [YOLO("yolov8n-dynamic_ghostnet_100.yaml").load(name) for name in names]
    x = torch.rand(1, 3, 64, 64)
    first = [network.model.model[0].eval()(x) for network in loaded]
    static = timm.create_model("ghostnet_100", features_only=True, out_indices=(2, 3, 4)).eval()
    static.load_state_dict({n: dict(_plain(dense))[n.replace("_", ".")] for n in static.state_dict()})
    backbone = loaded[0].model.model[0]
    wanted = static((x - backbone.mean) / backbone.std)
    for found in first:
        for ours, theirs in zip(found, wanted, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_names_of_0_1_0_transfer(detector, tmp_path, prefix):
    old = {}
    for name, value in weights.read(weights.find(NAME)).items():
        for new, former in FORMER.items():
            name = name.replace(new, former, 1) if name.startswith(new) else name
        old[prefix + name] = value
    assert any(name.startswith(f"{prefix}conv_stem.") for name in old)
    weights.save(old, tmp_path / "old.safetensors")
    detector.load(tmp_path / "old.safetensors")
    assert transferred(detector, weights.read(weights.find(NAME))) == 652


def test_dense_weights_of_the_same_network_are_upcycled(tmp_path):
    dense = lively(timm.create_model("ghostnetv2_100", num_classes=3))
    weights.save(dense.state_dict(), tmp_path / "dense.safetensors")
    detector = YOLO("yolov8n-dynamic_ghostnetv2_100.yaml").load(tmp_path / "dense.safetensors")
    static = timm.create_model("ghostnetv2_100", features_only=True, out_indices=(2, 3, 4))
    static.load_state_dict({n: dict(_plain(dense))[n.replace("_", ".")] for n in static.state_dict()})
    backbone, x = detector.model.model[0].eval(), torch.rand(1, 3, 64, 64)
    for ours, theirs in zip(backbone(x), static.eval()((x - backbone.mean) / backbone.std), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


def _plain(model):
    return ((name.replace("_", "."), value) for name, value in model.state_dict().items())


def test_grey_images_get_the_stem_that_timm_makes_of_it(classifier, file):
    d = tasks.yaml_model_load("yolov8n-parameternet_50m.yaml")
    model = tasks.DetectionModel(d, ch=1, verbose=False)
    model.load(tasks.load_checkpoint(file)[0] if hasattr(tasks, "load_checkpoint") else tasks.torch_safe_load(file)[0])
    grey = timm.create_model(
        "parameternet_50m", in_chans=1, num_classes=3, pretrained=True,
        pretrained_cfg_overlay={"file": str(file), "num_classes": 3},
    )  # fmt: skip
    own, given = model.model[0].net.state_dict(), dict(_plain(grey))
    assert all(torch.equal(value, given[name.replace("_", ".")]) for name, value in own.items())


FOREIGN = r"missing: \d+, such as model\.0\.conv\.weight; there are bn1\.bias"
RESHAPED = r"have other shapes: \d+, such as .*\(\d.* there and \(\d"
MISFITS = {
    "another size": (
        "parameternet_300m",
        "yolov8n-parameternet_50m",
        r"have other shapes: \d+, such as .*\(\d.* there and \(\d",
    ),
    "another family": ("resnet18", "yolov8n-parameternet_50m", r"are missing: \d+, .*Load weights of parameternet_50m"),
    "not for these rows": (
        "resnet18",
        "yolov8n-dynamicconv",
        r"missing: \d+, such as model\.0\.conv\.weight; there are bn1\.bias",
    ),
    "not for stock rows": ("resnet18", "yolov8n", FOREIGN),
}


@pytest.mark.parametrize(("given", "name", "message"), MISFITS.values(), ids=MISFITS)
def test_weights_that_give_the_backbone_nothing_are_an_error(tmp_path, given, name, message):
    weights.save(timm.create_model(given, num_classes=3).state_dict(), tmp_path / "other.safetensors")
    detector = YOLO(f"{name}.yaml")
    before = state(detector)
    with pytest.raises(weights.WeightsError, match=rf"other\.safetensors does not fit yolov8.?-?.*{message}"):
        detector.load(tmp_path / "other.safetensors")
    assert all(torch.equal(value, before[n]) for n, value in detector.model.state_dict().items())


def test_a_stock_detector_gives_a_network_of_timm_nothing(detector, tmp_path):
    YOLO("yolov8n.yaml").save(tmp_path / "stock.pt")
    with pytest.raises(weights.WeightsError, match=r"stock\.pt does not fit"):
        detector.load(tmp_path / "stock.pt")


def test_stock_networks_load_as_ever(tmp_path):
    YOLO("yolo11n.yaml").save(tmp_path / "other.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        YOLO("yolov8n.yaml").load(tmp_path / "other.pt")


def test_a_checkpoint_of_a_trainer_gives_its_average(detector):
    model = lively(YOLO("yolov8n-parameternet_50m.yaml").model)
    detector.model.load({"model": None, "ema": model})
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in detector.model.state_dict().items())


def test_unchecked_files_are_not_read_by_a_row():
    rows = [[-1, 1, "TimmBackbone", ["resnet18", {"checkpoint_path": "x.pth"}]], [0, 1, "TimmStage", [8]]]
    with pytest.raises(ValueError, match=r"checkpoint_path is not supported.*load the weights of resnet18"):
        tasks.parse_model({"nc": 2, "scale": "n", "backbone": rows, "head": []}, 3, verbose=False)


def test_training_an_upcycled_network_keeps_it_dynamic(data, tmp_path):
    model = YOLO("yolov8n.yaml")
    model.model = parameternet.upcycle(model.model.eval(), probe=torch.zeros(1, 3, 64, 64))
    model.save(tmp_path / "upcycled.pt")
    converted = {layer.name for layer in model.model.upcycling.converted}
    again = YOLO(tmp_path / "upcycled.pt")
    again.train(
        data=str(data), project=str(tmp_path), name="run", imgsz=64, batch=4, workers=0, plots=False, epochs=1,
        device="cpu", verbose=False, val=False,
    )  # fmt: skip
    dynamic = {name for name, module in again.model.named_modules() if isinstance(module, DynamicConv)}
    # For other classes Ultralytics makes new last layers, one for each of three strides.
    assert dynamic <= converted and len(dynamic) >= len(converted) - 3
