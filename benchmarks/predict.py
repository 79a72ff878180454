"""How much of a network's own throughput does bulk prediction keep?

    python benchmarks/predict.py data/val.tar                        Lite0 and the 50M: 10 minutes
    python benchmarks/predict.py IMAGES.tar NAME --number 1000 --workers 1

In each round `predict_to_file` classifies the first `--number` images of a tar, with the images decoded by `--workers`
processes, and the network alone classifies as many random images in batches of the same size. A ratio is that of the
two throughputs in a round: median and quartiles. Loading the network and writing the results count as prediction.
Results go to benchmarks/results/predict.csv.
"""

import argparse
import tarfile
import tempfile
import time
from pathlib import Path

import torch
from _timing import ROOT, Row, Spread, header, ratio, write_csv

from parameternet.memory import keep_freed_memory
from parameternet.prediction import predict_to_file
from parameternet.prediction.predictor import Predictor

RESULT = ROOT / "benchmarks" / "results" / "predict.csv"
NETWORKS = ("dynamic_efficientnet_lite0", "parameternet_50m.tin200")
BATCH = 64


def some_images(source: Path, number: int, folder: Path) -> Path:
    """The first `number` files of a tar, as a tar."""
    path = folder / "some.tar"
    with tarfile.open(source) as old, tarfile.open(path, "w") as new:
        for member in [member for member in old if member.isfile()][:number]:
            new.addfile(member, old.extractfile(member))
    return path


@torch.inference_mode()
def alone(predictor: Predictor, number: int) -> None:
    x = torch.randn(BATCH, *predictor.data_config["input_size"])
    for start in range(0, number, BATCH):
        predictor.model(x[: number - start])


def measure(name: str, images: Path, number: int, options: argparse.Namespace, folder: Path) -> Row:
    predictor = Predictor(name, "cpu")
    times: dict[str, list[float]] = {"predict": [], "alone": []}
    for turn in range(options.rounds + 1):  # the first one warms up
        output = folder / f"{name}-{turn}.csv"
        runs = {
            "predict": lambda output=output: predict_to_file(
                name, [images], output, batch_size=BATCH, workers=options.workers, device="cpu"
            ),
            "alone": lambda: alone(predictor, number),
        }
        for key, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:
                times[key].append(time.perf_counter() - start)
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
    parser.add_argument("--number", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    keep_freed_memory()  # as the command line does
    torch.set_num_threads(1)
    head = [*header(1, "cpu"), f"batches of {BATCH}, {options.workers} workers beside the network's one thread"]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        images = some_images(options.images, options.number, Path(folder))
        for name in options.networks:
            found.append(measure(name, images, options.number, options, Path(folder)))
            print(found[-1], flush=True)
    write_csv(options.output, head, found)


if __name__ == "__main__":
    main()
