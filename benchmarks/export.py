"""What exported files weigh, how far they are from the network, and what they cost beside the static network.

    python benchmarks/export.py                   parameternet_600m and parameternet_50m at 224 pixels: 15 minutes
    python benchmarks/export.py parameternet_150m --rounds 51

    python benchmarks/export.py --int8 IMAGES     8 bits against floats, to benchmarks/results/int8.csv: half an hour
    python benchmarks/export.py --mobile          the formats of timmx, to benchmarks/results/mobile.csv: half an hour

Every row is a file made by `parameternet.export.export`, which runs it at batches 1, 3 and 8 (or its fixed batch) and
refuses it above a relative difference of 1e-4; the largest one stands in the row. The networks have random weights.

Latency is that of one picture on one thread: in onnxruntime (the measure of the ParameterNet article) for ONNX, in
OpenVINO for its format, and with `--runtimes torchscript torch.export` in PyTorch for these two. Files of one runtime
take turns; a ratio is that to the static twin (`dynamic=False`) in the same runtime, exported in the same way with the
batch fixed to 1, each round by itself: median and quartiles. Results go to benchmarks/results/export.csv.

With `--mobile` every row is a format and a form at batch 1, with the weights of the checkpoint of that name, or random
ones at `--size`. Both forms take turns on one core. What is only converted has no difference and no latency, what fails
has the reason. Rows of other networks and formats stay, as formats may want environments of their own.
"""

import argparse
import importlib.metadata
import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import timm
import torch
from _timing import ROOT, Row, Spread, header, interleave, ratio, read_csv, write_csv

import parameternet  # noqa: F401  registers the networks
from parameternet.export import FIXED, FORMS, Exported, ExportError, export, read_metadata
from parameternet.layers import Router
from parameternet.models import catalogue

RESULTS = ROOT / "benchmarks" / "results"
# runtime: format of its files
RUNTIMES = {"onnxruntime": "onnx", "openvino": "openvino", "torchscript": "torchscript", "torch.export": "torch_export"}
MOBILE_NETWORKS = ["parameternet_50m.tin200", "dynamic_efficientnet_lite0.in1k_upcycled", "parameternet_600m"]
ENDINGS = {"onnx": ".onnx", "openvino": ".xml", "torchscript": ".torchscript", "torch_export": ".pt2"}


def on_one_thread(runtime: str, path: Path) -> Callable[[np.ndarray], object]:
    """The file as a function of a picture, on one thread."""
    writer = importlib.import_module(f"parameternet.export.{RUNTIMES[runtime]}")
    return writer.runner(path, threads=1) if runtime in ("onnxruntime", "openvino") else writer.runner(path)


def files(name: str, format: str, size: int, folder: Path) -> dict[str, Exported]:
    """The static twin and the network in every form, with the batch fixed to 1 and free."""
    torch.manual_seed(0)
    network, static = (timm.create_model(name, num_classes=1000, dynamic=d) for d in (True, False))
    made = {}
    for title, model, form, batch in [
        ("static", static, "constant", 1),
        *(
            (f"{form}, batch {batch or 'free'}", network, form, batch)
            for form in FORMS
            for batch in (1, None)
            if batch is None or form != "looped"
        ),
    ]:
        path = folder / f"{name}-{title.replace(', ', '-').replace(' ', '-')}{ENDINGS[format]}"
        made[title] = export(model, path, format, form=form, batch=batch, size=size)
        print(f"  {title}: {max(made[title].differences.values()):.1e}", file=sys.stderr)
    return made


def rows(name: str, runtime: str, size: int, rounds: int, folder: Path) -> list[dict[str, object]]:
    print(f"{name}, {runtime}", file=sys.stderr)
    made = files(name, RUNTIMES[runtime], size, folder)
    x = np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)
    runs = {title: partial(on_one_thread(runtime, file.path), x) for title, file in made.items()}
    times = interleave(runs, rounds, "cpu")
    found = []
    for title, file in made.items():
        spent, beside = Spread.of(times[title]), ratio(times[title], times["static"])
        found.append(
            {
                "network": name,
                "format": file.format,
                "form": title,
                "MB": f"{file.bytes / 1e6:.1f}",
                **{f"difference at batch {b}": _difference(file, b) for b in (1, 3, 8)},
                "runtime": runtime,
                "ms": f"{spent.median * 1e3:.2f}",
                "ms, quartiles": f"{spent.low * 1e3:.2f} to {spent.high * 1e3:.2f}",
                "times static": f"{beside.median:.2f}",
                "times static, quartiles": f"{beside.low:.2f} to {beside.high:.2f}",
            }
        )
    return found


def _difference(file: Exported, batch: int) -> str:
    return next((f"{value:.0e}" for at, value in file.differences.items() if at.startswith(f"batch {batch},")), "")


def int8_row(name: str, format: str, form: str, images: Path, folder: Path) -> Row:
    """A network in 8 bits, compared with itself in floats."""
    print(f"{name}, {format}, {form}", file=sys.stderr)
    report = export(name, folder / f"{name}-{form}{ENDINGS[format]}", format, form=form, int8=images).int8
    assert report
    routing, top1 = report["routing_agreement"].values(), report["top1"]
    return {
        "network": name,
        "format": format,
        "form": form,
        "calibration images": report["calibration_images"],
        "checked images": report["checked_images"],
        "MB": f"{report['bytes']['int8'] / 1e6:.1f}",
        "of float32": f"{report['bytes']['ratio']:.2f}",
        "same class, %": f"{report['agreement']:.2f}",
        "top-1 lost": f"{top1['lost']:.2f}" if top1 else "",
        "top-1 in floats": f"{top1['float32']:.2f}" if top1 else "",
        "same expert, %": f"{sum(routing) / len(routing):.2f}",
        "in the worst layer": f"{min(routing):.2f}",
        "routing weights differ by": f"{max(report['routing_difference'].values()):.3f}",
        "ms": f"{report['ms']['int8']:.2f}",
        "ms in floats": f"{report['ms']['float32']:.2f}",
    }


def measure_int8(options: argparse.Namespace, head: list[str]) -> None:
    path = options.output or RESULTS / "int8.csv"
    found: list[Row] = [*read_csv(path)[1]] if path.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.networks or ["parameternet_50m.tin200", "dynamic_efficientnet_lite0"]:
            for runtime in options.runtimes:
                for form in options.forms:
                    new = int8_row(name, RUNTIMES[runtime], form, options.int8, Path(folder))
                    found = replaced(found, new, ("network", "format", "form"))
                    write_csv(path, head, found)
    show(found)


def replaced(rows: list[Row], new: Row, key: tuple[str, ...]) -> list[Row]:
    """The rows with `new` in the place of that of the same key, or at the end."""
    places = [index for index, row in enumerate(rows) if all(row[column] == new[column] for column in key)]
    return [*rows[: places[0]], new, *rows[places[0] + 1 :]] if places else [*rows, new]


def drawn(name: str) -> torch.nn.Module:
    """A network with random weights whose routers, too, are not at their start, where all images have one routing."""
    model = timm.create_model(name, num_classes=1000)
    for router in filter(lambda module: isinstance(module, Router), model.modules()):
        torch.nn.init.normal_(router.weight)
    return model


def mobile_rows(name: str, format: str, size: int, rounds: int, folder: Path) -> list[Row]:
    """Both forms of a network in a format of timmx; without a checkpoint of that name, with random weights."""
    trained = name in catalogue.checkpoints()
    writer = importlib.import_module(f"parameternet.export.{format}")
    found: dict[str, Row] = {}
    runs = {}
    for form in FORMS[:2]:
        print(f"{name}, {format}, {form}", file=sys.stderr)
        torch.manual_seed(0)
        model, weights = (name, "checkpoint") if trained else (drawn(name), "random")
        found[form] = row = {"network": name, "weights": weights, "format": format, "form": form}
        row |= {"MB": "", "difference": "", "ms": ""}
        try:
            made = export(
                model, folder / f"{form}{writer.SUFFIX}", format, form=form, batch=1, size=None if trained else size
            )
        except (ExportError, ModuleNotFoundError) as error:
            row |= {"result": str(error)}
            continue
        row |= {"MB": f"{made.bytes / 1e6:.1f}", "difference": _difference(made, 1)}
        row |= {"result": "only converted" if made.unchecked else "run and compared"}
        if not made.unchecked:
            x = np.random.default_rng(0).standard_normal((1, *read_metadata(made.path)["input_size"]))
            threads = {} if format == "executorch" else {"threads": 1}
            runs[form] = partial(writer.runner(made.path, **threads), x.astype(np.float32))
    for form, times in interleave(runs, rounds, "cpu").items() if runs else ():
        found[form]["ms"] = f"{Spread.of(times).median * 1e3:.1f}"
    return [*found.values()]


def measure_mobile(options: argparse.Namespace, head: list[str]) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # not every runtime lets one choose its threads
    path = options.output or RESULTS / "mobile.csv"
    found: list[Row] = [*read_csv(path)[1]] if path.exists() else []
    for format in options.formats:
        for name in options.networks or MOBILE_NETWORKS:
            with tempfile.TemporaryDirectory() as folder:
                new = mobile_rows(name, format, options.size, options.rounds, Path(folder))
            found = [row for row in found if (row["network"], row["format"]) != (name, format)] + new
            write_csv(path, head, found)
    show(found)


def show(found: list[Row]) -> None:
    widths = {key: max(len(key), *(len(str(row[key])) for row in found)) for key in found[0]}
    for row in [dict(zip(found[0], found[0], strict=True)), *found]:
        print("  ".join(str(row[key]).ljust(width) for key, width in widths.items()).rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", help="[default: parameternet_600m parameternet_50m]")
    parser.add_argument("--int8", type=Path, metavar="IMAGES", help="a folder or .tar of images to calibrate with")
    parser.add_argument("--forms", nargs="+", choices=FORMS[:2], default=["computed"], help="with --int8")
    parser.add_argument("--mobile", action="store_true", help="the formats of timmx")
    parser.add_argument("--formats", nargs="+", choices=FIXED, default=FIXED, help="with --mobile")
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=["onnxruntime", "openvino"])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--output", type=Path, help="[default: benchmarks/results/export.csv, int8.csv or mobile.csv]")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.mobile:
        names = ("timmx", "ncnn", "pnnx", "litert-torch", "ai-edge-litert", "executorch", "coremltools")
        packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
        return measure_mobile(options, [*header(1, "cpu"), packages, f"batch 1, {options.rounds} rounds taking turns"])
    packages = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("onnxruntime", "openvino", "onnx", "nncf")
    )
    if options.int8:
        return measure_int8(options, [*header(1, "cpu"), packages, "one thread, batch 1; the machine was not idle"])
    head = [*header(1, "cpu"), packages, f"{options.size} pixels, batch 1, {options.rounds} rounds taking turns"]
    print("\n".join(head))
    found: list[dict[str, object]] = []
    for name in options.networks or ["parameternet_600m", "parameternet_50m"]:
        for runtime in options.runtimes:
            with tempfile.TemporaryDirectory() as folder:
                found += rows(name, runtime, options.size, options.rounds, Path(folder))
    show(found)
    write_csv(options.output or RESULTS / "export.csv", head, found)


if __name__ == "__main__":
    main()
