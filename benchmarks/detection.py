"""Compare yolov8n and yolo26n with their dynamic variants, and yolov8n with timm backbones, on small data.

    python benchmarks/detection.py --data bccd.yaml            missing networks and seeds, then the table
    python benchmarks/detection.py --table                     the table in Markdown and the plot only
    python benchmarks/detection.py --data bccd.yaml --int8 BEST.pt    a trained detector in 8 bits

Stock Ultralytics trains, all networks by the same settings (SGD as in the articles, no mixed precision). A run is a
folder in runs/detection and is resumed. Each epoch's mAP on the validation images goes to
benchmarks/results/detection.csv when a run is finished; runs in that file are not repeated.

The table has, for each network, the mean of the last five epochs, which varies less than the best one, as mean and
standard deviation over seeds; parameters, GFLOPs at 640 pixels as Ultralytics counts them, and the latency of one image
on one thread with batch norm folded in, relative to yolov8n, the median of runs that take turns.

`NAME+pretrained` starts the backbone from its weights, `NAME` from random ones.

With `--int8`, Ultralytics exports the file in 32-bit floats and in 8 bits, calibrated on the validation images that
`data` names, and validates both in their runtimes, to benchmarks/results/int8_detectors.csv. A batch is one picture; ms
are those that Ultralytics reports for inference, with the threads that the runtime takes.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ |= {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}

import torch
import yaml
from _timing import ROOT, Spread, add_run, header, interleave, ratio, read_csv, read_runs, write_csv

import parameternet.yolo
from parameternet.yolo import YOLO

RESULT = ROOT / "benchmarks" / "results" / "detection.csv"
INT8_RESULT = RESULT.with_name("int8_detectors.csv")
RUNS = ROOT / "runs" / "detection"
STOCK = "yolov8n"
NETWORKS = (
    STOCK,
    "yolov8n-dynamicconv",
    "yolov8n-dynamicconvbnact",
    "yolov8n-c2f-dynamicconv",
    "yolov8n-c2f-ghost-dynamicconv",
    "yolov8n-dynamic_efficientnet_lite0",
    "yolov8n-dynamic_efficientnet_lite0+pretrained",
    "yolov8n-parameternet_50m",
    "yolov8n-parameternet_50m+pretrained",
    "yolov8n-parameternet_600m",
    "yolov8n-parameternet_600m+pretrained",
    "yolo26n",
    "yolo26n-c2f-dynamicconv",
)
LAST = 5
Row = dict[str, str]
Run = tuple[str, str]  # network, seed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="YAML of the data set")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--imgsz", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--int8", type=Path, metavar="BEST.pt", help="compare this detector in 8 bits and in floats")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        train(options.networks[0], options.seeds[0], options)
        return
    if options.int8:
        int8(options)
        return
    if not options.table:
        if not options.data:
            parser.error("--data is needed to train")
        known = read_runs(RESULT, settings(options))
        wanted = [(network, str(seed)) for seed in options.seeds for network in options.networks]
        missing = [run for run in wanted if run not in known]
        with ThreadPoolExecutor(options.jobs) as pool:
            for run in pool.map(_start, missing):
                collect(run, options)
    print("\n".join(table()))
    print(plot())


def _start(run: Run) -> Run:
    """Train a run in a process of its own, with the arguments of this one; return the run."""
    network, seed = run
    command = [sys.executable, "-W", "ignore", *sys.argv, "--one", "--networks", network, "--seeds", seed]
    folder = RUNS / f"{network}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "a") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
    print(f"{network}, seed {seed}: {'done' if done.returncode == 0 else f'failed, see {folder}/log.txt'}", flush=True)
    return run


def train(network: str, seed: int, options: argparse.Namespace) -> None:
    """Train or resume a run."""
    folder = RUNS / f"{network}-{seed}"
    last = folder / "run" / "weights" / "last.pt"
    if len(_history(folder)) >= options.epochs:
        return
    if last.is_file() and _history(folder):
        YOLO(last).train(resume=True)
        return
    YOLO(_description(network, folder)).train(
        data=str(options.data.resolve()), epochs=options.epochs, imgsz=options.imgsz, batch=options.batch, seed=seed,
        device=options.device, optimizer="SGD", amp=False, close_mosaic=10, workers=0, cache="ram", plots=False,
        pretrained=False, project=str(folder), name="run", exist_ok=True, verbose=False,
    )  # fmt: skip


def _description(network: str, folder: Path) -> str:
    """Return the YAML of a network; one of its own if the backbone starts from weights."""
    name, _, pretrained = network.partition("+")
    if not pretrained:
        return f"{name}.yaml"
    from ultralytics.nn.tasks import yaml_model_load

    d = yaml_model_load(f"{name}.yaml")
    d["backbone"][0][3] = [d["backbone"][0][3][0], {"pretrained": True}]
    path = folder / "yolov8n-pretrained.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in d.items() if key not in ("scale", "yaml_file")}))
    return str(path)


def _history(folder: Path) -> list[Row]:
    path = folder / "run" / "results.csv"
    if not path.is_file():
        return []
    with open(path, newline="") as lines:
        return [{key.strip(): value.strip() for key, value in row.items()} for row in csv.DictReader(lines)]


def settings(options: argparse.Namespace) -> str:
    """What runs must have in common to be compared."""
    return f"settings: {options.data.stem}, {options.imgsz} px, {options.epochs} epochs, batch {options.batch}, SGD"


def collect(run: Run, options: argparse.Namespace) -> None:
    """Add the epochs of a finished run to the results."""
    network, seed = run
    epochs = [
        {"network": network, "seed": seed, "epoch": row["epoch"], "mAP50": row["metrics/mAP50(B)"],
         "mAP50-95": row["metrics/mAP50-95(B)"]}
        for row in _history(RUNS / f"{network}-{seed}")
    ]  # fmt: skip
    if len(epochs) == options.epochs:
        add_run(RESULT, run, epochs, list(NETWORKS), [*header(1, options.device), settings(options)])


def int8(options: argparse.Namespace) -> None:
    """Export a detector in floats and in 8 bits, validate both, and write a row for each format."""
    known = read_csv(INT8_RESULT)[1] if INT8_RESULT.is_file() else []
    name = Path(YOLO(options.int8).model.yaml["yaml_file"]).stem
    rows = [row for row in known if row["network"] != name]
    for format in ("onnx", "openvino"):
        # The second file overwrites the first.
        floats, eight = (_validated(options, format, eight_bits) for eight_bits in (False, True))
        row = {"network": name, "format": format, "MB": f"{eight['MB']:.1f}",
               "of float32": f"{eight['MB'] / floats['MB']:.2f}"}  # fmt: skip
        for key in ("mAP50", "mAP50-95", "ms"):
            row |= {key: f"{eight[key]:.2f}", f"{key} in floats": f"{floats[key]:.2f}"}
        rows.append(row)
    write_csv(INT8_RESULT, [*header(1, options.device), f"{options.data.stem}, {options.imgsz} px"], rows)
    print(*rows, sep="\n")


def _validated(options: argparse.Namespace, format: str, eight_bits: bool) -> dict[str, float]:
    """Export the detector, and return size in MB, mAP in percent, and ms per picture of the file."""
    data = str(options.data.resolve())
    precision = {"int8": True, "data": data} if eight_bits else {}
    exported = Path(YOLO(options.int8).export(format=format, imgsz=options.imgsz, batch=1, **precision))
    files = [file for file in exported.rglob("*") if file.is_file()] if exported.is_dir() else [exported]
    found = YOLO(exported, task="detect").val(
        data=data, imgsz=options.imgsz, batch=1, device=options.device, rect=False, plots=False, verbose=False,
        project=str(RUNS), name="int8", exist_ok=True,
    )  # fmt: skip
    return {
        "MB": sum(file.stat().st_size for file in files) / 1e6,
        "mAP50": 100 * found.box.map50,
        "mAP50-95": 100 * found.box.map,
        "ms": found.speed["inference"],
    }


def by_network() -> dict[str, list[list[Row]]]:
    """Group results by network and seed."""
    found: dict[str, list[list[Row]]] = {}
    for (network, _), rows in read_runs(RESULT).items():
        found.setdefault(network, []).append(rows)
    return found


def table() -> list[str]:
    """A row per network: size, cost, latency, and mAP over the last epochs, mean and spread over seeds."""
    runs = by_network()
    if not runs:
        raise SystemExit("no run is whole yet")
    plain_names = dict.fromkeys([STOCK, *(name.partition("+")[0] for name in runs)])
    models = {name: YOLO(f"{name}.yaml").model.eval() for name in plain_names}
    gflops = {name: parameternet.yolo.gflops(model) for name, model in models.items()}
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    times = _latency(models)
    lines = []
    for name, seeds in runs.items():
        plain = name.partition("+")[0]
        scores = [_spread([_late(rows, key) for rows in seeds]) for key in ("mAP50", "mAP50-95")]
        cells = (
            f"`{name}`",
            f"{sizes[plain] / 1e6:.2f} M",
            f"{gflops[plain]:.1f}",
            f"{times[plain].median:.2f}",
            str(len(seeds)),
            *scores,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _late(rows: list[Row], key: str) -> float:
    return 100 * statistics.mean(float(row[key]) for row in rows[-LAST:])


def _spread(values: list[float]) -> str:
    middle = f"{statistics.mean(values):.1f}"
    return middle if len(values) == 1 else f"{middle} ± {statistics.stdev(values):.1f}"


def _latency(models: dict[str, torch.nn.Module]) -> dict[str, Spread]:
    """Times relative to the stock network, one image of 256 pixels, one thread."""
    torch.set_num_threads(1)
    x = torch.rand(1, 3, 256, 256)
    fused = {name: model.fuse(verbose=False) for name, model in models.items()}
    with torch.inference_mode():
        times = interleave({name: lambda model=model: model(x) for name, model in fused.items()}, 11, "cpu")
    return {name: ratio(times[name], times[STOCK]) for name in times}


def plot() -> Path:
    """Plot mAP over epochs, a line per network, the mean over seeds."""
    from matplotlib.figure import Figure

    head, _ = read_csv(RESULT)
    architectures = list(dict.fromkeys(name.removesuffix("+pretrained") for name in by_network() if name != STOCK))
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2), ("mAP50", "mAP50-95"), strict=True):
        for name, seeds in by_network().items():
            curves = [[100 * float(row[key]) for row in rows] for rows in seeds]
            mean = [statistics.mean(values) for values in zip(*curves, strict=False)]
            style = "--" if name.endswith("+pretrained") else "-"
            colour = "0.2" if name == STOCK else f"C{architectures.index(name.removesuffix('+pretrained'))}"
            axes.plot(range(1, len(mean) + 1), mean, style, color=colour, label=name, linewidth=1.5)
        axes.set_xlabel("epoch")
        axes.set_ylabel(f"{key} on validation images, %")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle("\n".join(head), fontsize=7)
    out = RESULT.with_suffix(".png")
    figure.savefig(out, dpi=110)
    return out


if __name__ == "__main__":
    main()
