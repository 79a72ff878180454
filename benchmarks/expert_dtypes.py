"""What do experts in 16 or 8 bits save, and what do they cost in accuracy?

    python benchmarks/expert_dtypes.py data/val.tar     half an hour on one core

For each network, with batch norm folded in and experts in float32, float16, bfloat16 and int8
(`fuse(model, expert_dtype=...)`): bytes of its tensors, as a file holds them; milliseconds at 224 pixels and batch 1
and 8, the median of runs that take turns, and the ratio to float32 in the same round; and, on the first `--number`
images of the tar, top-1 where labels are the network's, images with the same first class as float32, and the largest
difference of a logit relative to the largest logit. Results go to benchmarks/results/expert_dtypes.csv.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from _timing import ROOT, Row, Spread, header, interleave, ratio, read_csv, write_csv
from torch import Tensor, nn

from parameternet import fuse
from parameternet.data.sources import Source, open_dataset
from parameternet.layers.compact import EXPERT_DTYPES
from parameternet.prediction import Predictor

RESULT = ROOT / "benchmarks" / "results" / "expert_dtypes.csv"
NETWORKS = {"parameternet_600m.tin200": 10_000, "dynamic_efficientnet_lite0": 1000}  # and how many images
BATCH = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="a tar of labelled images")
    parser.add_argument("names", nargs="*", default=list(NETWORKS))
    parser.add_argument("--number", type=int, help="images; else 10,000, for Lite0 1,000")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="for milliseconds")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = read_csv(RESULT)[1] if RESULT.is_file() else []
    for name in options.names:
        rows = [row for row in rows if row["network"] != name] + measure(name, options)
        write_csv(RESULT, header(options.threads, "cpu"), rows)


def measure(name: str, options: argparse.Namespace) -> list[Row]:
    """Return a row for each dtype."""
    predictor = Predictor(name, "cpu")
    models = {"float32": fuse(predictor.model).requires_grad_(False)}
    models |= {dtype: fuse(predictor.model, expert_dtype=dtype) for dtype in EXPERT_DTYPES}
    number = options.number or NETWORKS.get(name, 1000)
    logits, labels = answers(models, predictor, options.images, number)
    truth = logits["float32"]
    labelled = truth.shape[1] == int(labels.max()) + 1
    rows = {
        dtype: {
            "network": name,
            "experts": dtype,
            "MB": f"{size(models[dtype]) / 1e6:.1f}",
            "images": number,
            "top1": f"{100 * (found.argmax(1) == labels).double().mean():.2f}" if labelled else "",
            "same class": f"{100 * (found.argmax(1) == truth.argmax(1)).double().mean():.2f}",
            "logit difference": f"{(found - truth).abs().max() / truth.abs().max():.4f}",
        }
        for dtype, found in logits.items()
    }
    for batch in options.batches:
        x = torch.randn(batch, 3, 224, 224)
        runs = {dtype: torch.inference_mode()(partial(model, x)) for dtype, model in models.items()}
        times = interleave(runs, options.rounds, "cpu")
        for dtype, row in rows.items():
            spread = ratio(times[dtype], times["float32"])
            row[f"ms, batch {batch}"] = f"{1e3 * Spread.of(times[dtype]).median:.1f}"
            row[f"to float32, batch {batch}"] = f"{spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})"
    for row in rows.values():
        print(row, flush=True)
    return list(rows.values())


@torch.inference_mode()
def answers(
    models: dict[str, nn.Module], predictor: Predictor, path: Path, number: int
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the logits (N, classes) of each network and the labels (N,) of images spread over the whole tar."""
    source = Source(open_dataset(str(path), path.stem), path.name)
    places = torch.linspace(0, len(source.reader.samples) - 1, number).long().tolist()
    found: dict[str, list[Tensor]] = {name: [] for name in models}
    labels = []
    for start in range(0, number, BATCH):
        images, part = zip(*(source.read(place) for place in places[start : start + BATCH]), strict=True)
        x = torch.stack([predictor.preprocess(image) for image in images])
        labels += part
        for name, model in models.items():
            found[name].append(model(x))
    return {name: torch.cat(parts) for name, parts in found.items()}, torch.tensor(labels)


def size(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in model.state_dict().values())


if __name__ == "__main__":
    main()
