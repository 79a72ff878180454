"""From files to class names; the way through timm's transform is held against arithmetic done here."""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import checkpoints
import numpy as np
import pytest
import torch
from PIL import Image

from parameternet import prediction, weights
from parameternet.prediction import Predictor, Result, draw, drawing, read_image

PHOTOS = Path(__file__).parent / "photos"
ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("weights") / checkpoints.NAME)


@pytest.fixture(scope="module")
def predictor(folder):
    return Predictor(folder, device="cpu")


def noise(width=64, height=64, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# The network ---------------------------------------------------------------------------------------------------------


def test_the_config_alone_decides_size_normalisation_and_names(predictor):
    image = noise()  # of the test size, so that nothing is resized or cropped
    pixels = torch.from_numpy(np.asarray(image) / 255).float()
    x = (pixels - torch.tensor([0.5, 0.4, 0.3])) / torch.tensor([0.2, 0.3, 0.4])
    with torch.inference_mode():
        expected = checkpoints.network()(x.permute(2, 0, 1)[None]).softmax(-1)[0]
    result = predictor.predict(image)[0]
    assert result.error is None
    assert result.indices == expected.argsort(descending=True).tolist()
    assert result.probabilities == pytest.approx(expected.sort(descending=True).values.tolist(), abs=1e-5)
    assert result.labels == [list(checkpoints.LABELS.values())[index] for index in result.indices]


def test_photos_get_different_classes_and_probabilities_sum_to_one(predictor):
    results = predictor.predict(PHOTOS)
    assert [Path(result.path).name for result in results] == ["cat.jpg", "coffee.jpg", "rocket.jpg"]
    assert len({tuple(result.probabilities) for result in results}) == 3
    for result in results:
        assert sum(result.probabilities) == pytest.approx(1, abs=1e-5)
        assert result.probabilities == sorted(result.probabilities, reverse=True)


def test_batches_do_not_matter(predictor):
    images = [noise(seed=seed) for seed in range(5)]
    at_once, in_parts = predictor.predict(images), predictor.predict(images, batch_size=2)
    for a, b in zip(at_once, in_parts, strict=True):
        assert a.indices == b.indices
        assert a.probabilities == pytest.approx(b.probabilities, abs=1e-5)


def test_topk(predictor):
    assert len(predictor.predict(noise(), topk=2)[0].labels) == 2
    assert len(predictor.predict(noise(), topk=99)[0].labels) == 5
    with pytest.raises(ValueError, match="topk must be at least 1, got 0"):
        predictor.predict(noise(), topk=0)


@pytest.mark.parametrize("form", ["folder", "local-dir", "file", "run folder", "recorded", "architecture", "network"])
def test_every_name_of_a_network_gives_the_same_answer(folder, predictor, monkeypatch, tmp_path, form):
    checkpoints.record(monkeypatch, folder)
    run = tmp_path / "run"
    run.mkdir()
    model = checkpoints.network()
    weights.save(model.state_dict(), run / "best.safetensors", {"config": json.dumps(checkpoints.config())})
    named = {
        "folder": folder,
        "local-dir": f"local-dir:{folder}",
        "file": folder / weights.FILE_NAME,
        "run folder": run,
        "recorded": checkpoints.NAME,
        "architecture": "parameternet_50m",
        "network": predictor.model,
    }
    assert Predictor(named[form], "cpu").predict(noise()) == predictor.predict(noise())


needs_lite = pytest.mark.skipif(
    weights.packaged("timm/tf_efficientnet_lite0.in1k") is None, reason="the extra `demo` is not installed"
)


@needs_lite
def test_default_checkpoint_classifies_the_photos():
    predictor = Predictor(device="cpu")
    assert predictor.name == prediction.DEFAULT_MODEL and len(predictor.labels) == 1000
    first = [result.labels[0] for result in predictor.predict(PHOTOS)]
    assert first == ["tiger cat", "espresso", "missile"]  # ImageNet has no closer name for a rocket


def test_a_folder_of_that_name_does_not_hide_the_recorded_checkpoint(folder, monkeypatch, tmp_path):
    checkpoints.record(monkeypatch, folder)
    checkpoints.write(tmp_path / checkpoints.NAME, checkpoints.network(seed=1))
    monkeypatch.chdir(tmp_path)
    assert Predictor(checkpoints.NAME, "cpu").predict(noise()) == Predictor(folder, "cpu").predict(noise())


def test_unrecorded_weights_are_rejected(monkeypatch, tmp_path):
    own = checkpoints.write(tmp_path / checkpoints.NAME)
    checkpoints.record(monkeypatch, own)
    checkpoints.write(own, checkpoints.network(seed=1))
    with pytest.raises(weights.WeightsDamaged, match="is not the recorded file"):
        Predictor(checkpoints.NAME)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("parameternet_50m.tin20", weights.UnknownWeights, "closest: parameternet_50m.tin200"),
        ("resnet50", weights.UnknownWeights, "no weights are recorded for resnet50"),
        ("no/such/folder", weights.WeightsNotFound, "no such folder or file"),
    ],
)
def test_unknown_names(folder, monkeypatch, name, error, message):
    checkpoints.record(monkeypatch, folder)
    with pytest.raises(error, match=message):
        Predictor(name)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"label_names": ["a", "b"]}, ValueError, "names 2 classes, but the network has 5"),
        ({"architecture": "resnet18"}, ValueError, "resnet18 is not a network of this package"),
        ({"pretrained_cfg": None, "architecture": None}, None, ""),
    ],
)
def test_configs_that_do_not_fit(tmp_path, changes, error, message):
    if error is None:  # neither key at all
        checkpoints.write(tmp_path)
        (tmp_path / weights.CONFIG_NAME).write_text('{"num_classes": 5}')
        error, message = weights.WeightsDamaged, "lacks architecture and pretrained_cfg"
    else:
        checkpoints.write(tmp_path, **changes)
    with pytest.raises(error, match=message):
        Predictor(tmp_path)


def test_classes_without_names_are_numbered(tmp_path):
    checkpoints.write(tmp_path, label_names=None, label_descriptions=None)
    assert Predictor(tmp_path, "cpu").labels[2] == "class 2"


# Images --------------------------------------------------------------------------------------------------------------


def test_unreadable_images_are_reported_and_others_predicted(predictor, tmp_path):
    noise().save(tmp_path / "good.png")
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "cut.jpg").write_bytes((PHOTOS / "cat.jpg").read_bytes()[:9000])
    (tmp_path / "empty").mkdir()
    given = ["text.jpg", "good.png", "cut.jpg", "none.png", "empty"]
    results = predictor.predict([tmp_path / name for name in given], batch_size=2)
    assert [result.error for result in results] == [
        "not an image, or of a format that Pillow does not read",
        None,
        results[2].error,
        "no such file",
        results[4].error,
    ]
    assert results[2].error.startswith("cannot be read: image file is truncated")
    assert results[4].error.startswith("no images in this folder (.avif .bmp")
    assert results[1].probabilities == predictor.predict(noise())[0].probabilities
    assert not results[0].labels


def test_folders_are_searched_to_the_bottom_for_images_only(predictor, tmp_path):
    for name in ("b.PNG", "a/c.png", "a/b/d.webp", ".hidden/e.png", "a/.f.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        noise().save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    found = [Path(result.path).relative_to(tmp_path).as_posix() for result in predictor.predict(tmp_path)]
    assert found == ["a/b/d.webp", "a/c.png", "b.PNG"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_exif_says(tmp_path, orientation):
    stored = noise(width=7, height=5)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    a = np.asarray(stored)
    seen = {1: a, 2: a[:, ::-1], 3: a[::-1, ::-1], 4: a[::-1], 5: a.transpose(1, 0, 2), 6: np.rot90(a, -1),
            7: np.rot90(a, 2).transpose(1, 0, 2), 8: np.rot90(a)}  # fmt: skip
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), seen[orientation])


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "I", "F", "I;16"])
def test_every_mode_becomes_rgb_of_the_same_shades(mode):
    gray = np.linspace(0, 255, 256).astype(np.uint8).reshape(16, 16)
    gray = np.where(gray > 127, 255, 0).astype(np.uint8) if mode == "1" else gray
    if mode == "I;16":
        image = Image.fromarray(gray.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(gray).convert("L" if mode == "P" else "RGB" if mode in ("CMYK", "YCbCr") else "L")
        image = image.convert(mode)
    assert image.mode == mode
    rgb = read_image(image)
    assert rgb.mode == "RGB"
    assert np.abs(np.asarray(rgb).astype(int) - gray[..., None]).max() <= 2


def test_what_is_transparent_is_white(tmp_path):
    hidden = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert read_image(hidden).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.save(tmp_path / "a.png", transparency=0)
    assert read_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)


def test_a_network_for_one_channel_sees_gray(tmp_path):
    import timm

    torch.manual_seed(0)
    model = timm.create_model("parameternet_50m", num_classes=5, in_chans=1, **checkpoints.MODEL_ARGS)
    cfg = {**checkpoints.config()["pretrained_cfg"], "input_size": [1, 32, 32], "test_input_size": None,
           "mean": [0.5], "std": [0.5]}  # fmt: skip
    checkpoints.write(tmp_path, model, pretrained_cfg=cfg, model_args={**checkpoints.MODEL_ARGS, "in_chans": 1})
    assert Predictor(tmp_path, "cpu").predict(noise())[0].error is None


# Addresses -----------------------------------------------------------------------------------------------------------


class Server(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path != "/cat.jpg":
            self.send_error(404)
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write((PHOTOS / "cat.jpg").read_bytes())

    def log_message(self, *_):
        pass


@pytest.fixture
def address():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_addresses_are_fetched(predictor, address):
    fetched, missing = predictor.predict([f"{address}/cat.jpg", f"{address}/none.jpg"])
    assert fetched.probabilities == predictor.predict(PHOTOS / "cat.jpg")[0].probabilities
    assert missing.error == "the server answered 404 Not Found"


def test_endless_answers_are_cut_off(predictor, address, monkeypatch):
    monkeypatch.setattr(prediction.predictor, "MAX_DOWNLOAD", 1000)
    assert "larger than" in predictor.predict(f"{address}/cat.jpg")[0].error


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("http://127.0.0.1:9/cat.jpg", "no answer from there .*download it yourself"),
        ("ftp://127.0.0.1/cat.jpg", "only http and https addresses are fetched, not ftp"),
        ("file:///etc/passwd", "only http and https addresses are fetched, not file"),
    ],
)
def test_addresses_that_are_not_fetched(predictor, source, message):
    result = predictor.predict(source)[0]
    assert result.path == source
    assert re.match(message, result.error)


# The picture ---------------------------------------------------------------------------------------------------------


def blue(picture):
    """Width of the first class's bar, in points."""
    colour = np.array([int(drawing.FIRST_BAR[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.asarray(picture) == colour).all(-1).sum(1).max()) / drawing.SCALE


def test_bars_are_as_long_as_probabilities():
    for probability in (1.0, 0.5, 0.25):
        picture = draw([Result("a.jpg", ["tabby", "teapot"], [probability, 0.1], [0, 1], image=noise())])
        assert blue(picture) == pytest.approx(drawing.BARS * probability, abs=2)


def test_every_kind_of_result_fits_on_the_picture(predictor, tmp_path):
    results = predictor.predict([PHOTOS, tmp_path / "none.png", noise(400, 8)], keep_images=True)
    one, all_of_them = draw(results[:1]), draw(results, "parameternet_50m.tin200")
    assert all_of_them.width == one.width
    assert all_of_them.height > 3 * one.height
    assert max(results[0].image.size) <= drawing.SCALE * drawing.PHOTO
    first_column = np.asarray(all_of_them)[:, -1]
    assert (first_column == 255).all(), "text runs over the edge"
    assert draw(results, limit=2).height < all_of_them.height
    assert draw([]).height > 0
