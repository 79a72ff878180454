"""How much of a network's own throughput does bulk prediction keep?

    python benchmarks/predict.py data/val.tar                        Lite0 and the 50M: 12 minutes
    python benchmarks/predict.py IMAGES.tar NAME --number 1000 --workers 1

In each round `predict_to_file` classifies the first images of a tar, with the images decoded by `--workers`
processes, and the network alone classifies as many random images in batches of the same size. Each runs in a fresh
process, as the command does: workers are forks, and a large process pays for them with copies of its pages. A ratio is
that of the two throughputs in a round: median and quartiles. Loading the network and writing the results count as
prediction. Results go to benchmarks/results/predict.csv; rows of other networks there are kept.
"""

import argparse
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import torch
from _timing import ROOT, Row, Spread, header, ratio, read_csv, write_csv

from parameternet.memory import keep_freed_memory
from parameternet.prediction import predict_to_file
from parameternet.prediction.predictor import Predictor

RESULT = ROOT / "benchmarks" / "results" / "predict.csv"
NETWORKS = {"dynamic_efficientnet_lite0": 1000, "parameternet_50m.tin200": 10_000}  # and how many images
BATCH = 64


def some_images(source: Path, number: int, folder: Path) -> Path:
    """The first `number` files of a tar, as a tar."""
    path = folder / "some.tar"
    with tarfile.open(source) as old, tarfile.open(path, "w") as new:
        for member in [member for member in old if member.isfile()][:number]:
            new.addfile(member, old.extractfile(member))
    return path


@torch.inference_mode()
def alone(name: str, number: int) -> float:
    """Seconds for `number` random images."""
    predictor = Predictor(name, "cpu")
    x = torch.randn(BATCH, *predictor.data_config["input_size"])
    start = time.perf_counter()
    for done in range(0, number, BATCH):
        predictor.model(x[: number - done])
    return time.perf_counter() - start


def predicted(name: str, images: Path, workers: int) -> float:
    """Seconds from the name of a network to the file."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        predict_to_file(name, [images], Path(folder, "out.csv"), batch_size=BATCH, workers=workers, device="cpu")
        return time.perf_counter() - start


def in_another_process(what: str, name: str, images: Path, number: int, workers: int) -> float:
    command = [sys.executable, "-W", "ignore", __file__, str(images), name, "--measure", what]
    settings = ["--number", str(number), "--workers", str(workers)]
    done = subprocess.run([*command, *settings], stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def measure(name: str, images: Path, number: int, options: argparse.Namespace) -> Row:
    times: dict[str, list[float]] = {"predict": [], "alone": []}
    for _ in range(options.rounds):
        for what, seconds in times.items():
            seconds.append(in_another_process(what, name, images, number, options.workers))
    kept = ratio(times["alone"], times["predict"])
    return {
        "network": name,
        "images": number,
        "images/s": f"{number / Spread.of(times['predict']).median:.0f}",
        "alone": f"{number / Spread.of(times['alone']).median:.0f}",
        "kept": f"{kept.median:.2f}",
        "quartiles": f"{kept.low:.2f} to {kept.high:.2f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="a .tar")
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--number", type=int, help="of images; default: as listed in the program, or 1000")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--measure", choices=("predict", "alone"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    keep_freed_memory()  # as the command line does
    torch.set_num_threads(1)
    if options.measure:
        name = options.networks[0]
        alone_ = options.measure == "alone"
        print(alone(name, options.number) if alone_ else predicted(name, options.images, options.workers))
        return
    head = [*header(1, "cpu"), f"batches of {BATCH}, {options.workers} workers beside the network's one thread"]
    known = read_csv(options.output)[1] if options.output.exists() else []
    rows = [row for row in known if row["network"] not in options.networks]
    with tempfile.TemporaryDirectory() as folder:
        for name in options.networks:
            number = options.number or NETWORKS.get(name, 1000)
            images = some_images(options.images, number, Path(folder))
            rows.append(measure(name, images, number, options))
            print(rows[-1], flush=True)
    write_csv(options.output, head, rows)


if __name__ == "__main__":
    main()
