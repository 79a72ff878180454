"""`parameternet app`: a web page to try a network."""

import os
from pathlib import Path
from typing import Any

import click

from parameternet.app import build
from parameternet.cli.options import InputPath, device_option
from parameternet.cli.output import echo
from parameternet.prediction import DEFAULT_MODEL


@click.command()
@click.argument("model", default=DEFAULT_MODEL)
@click.option("--detector", type=InputPath(), help="A YOLO checkpoint, whose detections are shown.")
@click.option("--examples", type=InputPath(), help="Folder of images to try.  [default: three photos]")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to serve on; 0.0.0.0 accepts other machines."
)
@click.option("--port", type=click.IntRange(min=1, max=65535), help="[default: the first free one from 7860]")
@device_option
def app(model: str, detector: Path | None, examples: Path | None, host: str, port: int | None, device: str) -> None:
    """Serve a web page that classifies images with MODEL and shows which experts they use.

    It compares two images, and the network with its static baseline. MODEL is a checkpoint, a folder or run folder, a
    .safetensors file, local-dir:DIR or hf-hub:ORG/NAME. The page works offline.

    YOLO checkpoints are pickles, which can run code: pass --detector only files that you trust.
    """
    page = build(model, _detector(detector) if detector else None, [examples] if examples else None, device)
    _, address, _ = page.launch(server_name=host, server_port=port, prevent_thread_lock=True, quiet=True)
    echo(f"{address}  (Ctrl-C stops)", err=True)
    page.block_thread()


def _detector(path: Path) -> Any:
    os.environ.setdefault("YOLO_OFFLINE", "true")  # keeps Ultralytics from sending usage statistics
    # Under AGPL-3.0, unlike the rest of this package, so imported only on request.
    from parameternet.yolo.detector import Detector

    return Detector(path)
