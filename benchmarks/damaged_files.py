"""Load damaged checkpoints and count outcomes: refused, harmless, silently wrong.

    python benchmarks/damaged_files.py                 500 files from the default checkpoint
    python benchmarks/damaged_files.py --files 60      a quick look

Each file is a checkpoint with one damage. It is loaded strictly in several ways:

    recorded SHA-256   `timm.create_model("<architecture>.<tag>", pretrained=True)`: a recorded checkpoint
    digest only        `timm.create_model("local-dir:FOLDER", pretrained=True)`: only the digest in the file
    timm               the same, by timm's own loader
    YOLO               `YOLO("yolov8n-parameternet_50m.yaml").load(FILE)`, where Ultralytics is installed
    transformers       `AutoModelForImageClassification.from_pretrained(FOLDER)`, where transformers is installed

*refused*: an error. *harmless*: no error, and every tensor is bit for bit the right one (a flipped bit in the
metadata). *silently wrong*: no error, and wrong tensors. Exits with 1 if one of our loaders is ever silently wrong.
"""

import argparse
import hashlib
import importlib.util
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import timm
import torch
from timm.models._hub import load_state_dict_from_path
from torch import Tensor, nn

import parameternet  # noqa: F401  registers the networks
from parameternet import weights
from parameternet.weights import registry

NAME = "parameternet_50m.tin200"
PAGE = 4096
Damage = Callable[[bytes, random.Random], bytes]


def header_size(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def flip_payload(data: bytes, draw: random.Random) -> bytes:
    return _flip(data, draw.randrange(header_size(data), len(data)), draw)


def flip_header(data: bytes, draw: random.Random) -> bytes:
    return _flip(data, draw.randrange(header_size(data)), draw)


def zero_page(data: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(data) // PAGE) * PAGE
    return data[:start] + bytes(PAGE) + data[start + PAGE :]


def truncate(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def append_junk(data: bytes, draw: random.Random) -> bytes:
    return data + draw.randbytes(draw.randint(1, PAGE))


def swap_tensors(data: bytes, draw: random.Random) -> bytes:
    """Swap two tensors of one shape: names and shapes stay as the network expects."""
    end = header_size(data)
    header = json.loads(data[8:end])
    alike = defaultdict(list)
    for name, entry in header.items():
        first, last = entry.get("data_offsets", (0, 0))
        if last > first:
            alike[entry["dtype"], tuple(entry["shape"])].append(name)
    while True:
        a, b = draw.sample(draw.choice([names for names in alike.values() if len(names) > 1]), 2)
        (a0, a1), (b0, b1) = header[a]["data_offsets"], header[b]["data_offsets"]
        if data[end + a0 : end + a1] != data[end + b0 : end + b1]:
            break
    header[a]["data_offsets"], header[b]["data_offsets"] = [b0, b1], [a0, a1]
    return data[:8] + json.dumps(header, separators=(",", ":")).encode().ljust(end - 8) + data[end:]


# damage -> share of the files
DAMAGES: dict[str, tuple[Damage, float]] = {
    "bit flipped in the payload": (flip_payload, 0.30),
    "bit flipped in the header": (flip_header, 0.20),
    "page of zeros": (zero_page, 0.15),
    "cut short": (truncate, 0.15),
    "junk appended": (append_junk, 0.10),
    "tensors swapped": (swap_tensors, 0.10),
}


def _flip(data: bytes, position: int, draw: random.Random) -> bytes:
    return data[:position] + bytes([data[position] ^ 1 << draw.randrange(8)]) + data[position + 1 :]


def plan(files: int) -> list[str]:
    """Choose the damage of each file; every kind occurs."""
    return [name for name, (_, share) in DAMAGES.items() for _ in range(max(1, round(files * share)))]


def routes(folder: Path) -> dict[str, Callable[[], dict[str, Tensor]]]:
    architecture, tag = NAME.split(".")
    return {
        "recorded SHA-256": lambda: weights.resolve({"architecture": architecture, "tag": tag}),
        "digest only": lambda: weights.resolve({"source": "local-dir", "file": str(folder)}),
        "timm": lambda: load_state_dict_from_path(folder),
    }


def into(model: nn.Module, read: Callable[[], dict[str, Tensor]]) -> Callable[[], dict[str, Tensor]]:
    """Wrap a reader so that its tensors are loaded into a network, strictly."""

    def load() -> dict[str, Tensor]:
        tensors = read()
        model.load_state_dict(tensors, strict=True)
        return tensors

    return load


def other_libraries(folder: Path) -> dict[str, Callable[[], dict[str, Tensor]]]:
    """Other installed libraries, each with the tensors of its network after loading the file."""
    found: dict[str, Callable[[], dict[str, Tensor]]] = {}
    if importlib.util.find_spec("ultralytics"):
        from ultralytics import YOLO

        import parameternet.yolo  # noqa: F401

        detector = YOLO(f"yolov8n-{NAME.split('.')[0]}.yaml")

        def into_detector() -> dict[str, Tensor]:
            return detector.load(str(folder / weights.FILE_NAME)).model.model[0].state_dict()

        found["YOLO"] = into_detector
    if importlib.util.find_spec("transformers"):
        from transformers import AutoModelForImageClassification
        from transformers.utils import logging as messages

        messages.disable_progress_bar()

        def into_transformers() -> dict[str, Tensor]:
            model, info = AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
            if info["missing_keys"] or info["mismatched_keys"]:
                raise ValueError("it tells of tensors that it drew at random")
            return model.state_dict()

        found["transformers"] = into_transformers
    return found


def outcome(read: Callable[[], dict[str, Tensor]], right: dict[str, Tensor]) -> str:
    try:
        tensors = read()
    except Exception:
        return "refused"
    return "harmless" if same(tensors, right) else "silently wrong"


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Compare bit for bit: NaN equals itself, and 0 differs from -0."""
    return a.keys() == b.keys() and weights.tensors_digest(a) == weights.tensors_digest(b)


def sweep(
    good: Path, model: nn.Module, files: int, seed: int = 0, others: bool = False
) -> dict[str, dict[str, Counter]]:
    """Counts of outcomes: route -> damage -> outcome -> files.

    `good` is a checkpoint of `model`, whole; with `others` it is that of NAME, and other libraries read it, too.
    """
    data = good.read_bytes()
    recorded = {NAME: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}}
    counts = defaultdict(lambda: defaultdict(Counter))
    with tempfile.TemporaryDirectory() as temporary:
        records = Path(temporary, "weights.json")
        records.write_text(json.dumps(recorded))
        folder = Path(temporary, NAME)
        folder.mkdir()
        places = mock.patch.dict(os.environ, PARAMETERNET_WEIGHTS=temporary)
        with places, mock.patch.object(registry, "RECORDS", records), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a file whose digest is unreadable warns; what counts here is the outcome
            (folder / weights.FILE_NAME).write_bytes(data)
            if (good.parent / weights.CONFIG_NAME).is_file():
                shutil.copy(good.parent / weights.CONFIG_NAME, folder)
            readers = {route: into(model, read) for route, read in routes(folder).items()}
            readers |= other_libraries(folder) if others else {}
            right = {route: {name: t.clone() for name, t in read().items()} for route, read in readers.items()}
            for number, damage in enumerate(plan(files)):
                draw = random.Random(f"{seed}-{number}")
                (folder / weights.FILE_NAME).write_bytes(DAMAGES[damage][0](data, draw))
                for route, read in readers.items():
                    counts[route][damage][outcome(read, right[route])] += 1
    return counts


def checkpoint(folder: Path) -> tuple[Path, nn.Module]:
    """The default checkpoint, or the same network with random weights where it has not been trained yet."""
    if NAME in weights.known():
        path = weights.find(NAME)
        return path, timm.create_model(NAME)
    model = timm.create_model(NAME.split(".")[0], num_classes=200)
    half = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()
    }
    weights.save(half, folder / weights.FILE_NAME)
    return folder / weights.FILE_NAME, model


def table(counts: dict[str, dict[str, Counter]]) -> str:
    outcomes = ("refused", "harmless", "silently wrong")
    lines = [f"{'':28}" + "".join(f"{route:>34}" for route in counts)]
    lines += [f"{'':28}" + f"{'refused  harmless  silently wrong':>34}" * len(counts)]
    for damage in [*DAMAGES, "all"]:
        cells = ""
        for by_damage in counts.values():
            row = sum(by_damage.values(), Counter()) if damage == "all" else by_damage[damage]
            cells += "{:>8}{:>10}{:>16}".format(*(row[o] for o in outcomes))
        lines.append(f"{damage:28}{cells}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        good, model = checkpoint(Path(folder))
        trained = "" if NAME in weights.known() else ", random weights"
        print(f"{len(plan(arguments.files))} damaged files of {NAME} ({good.stat().st_size:,} bytes{trained})")
        print(f"torch {torch.__version__}, timm {timm.__version__}, seed {arguments.seed}\n")
        counts = sweep(good, model, arguments.files, arguments.seed, others=NAME in weights.known())
    print(table(counts))
    ours = [rows for route, rows in counts.items() if route not in ("timm", "transformers")]
    return int(any(row["silently wrong"] for rows in ours for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
