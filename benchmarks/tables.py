"""Write the tables of README and docs: networks, checkpoints, speed, exports, comparisons, fields of recipes.

    python benchmarks/tables.py           print all tables
    python benchmarks/tables.py --write   put them between their markers, <!-- table: NAME --> and <!-- end -->
    python benchmarks/tables.py --check   exit with 1 and the names of tables that are out of date
    python benchmarks/tables.py speed     this table alone

Speed, exports and comparisons are what benchmarks/speed.py, export.py and compare.py last wrote to benchmarks/results.
"""

import argparse
import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import NamedTuple

import compare
import timm
import torch
from _timing import ROOT, read_csv

import parameternet  # noqa: F401  registers the networks
from parameternet import weights
from parameternet.flops import count_flops
from parameternet.layers import Router
from parameternet.models.dynamic_timm import SOURCES
from parameternet.training import Recipe, load_recipe
from parameternet.training.recipe import allowed

ORIGIN = {
    "parameternet_50m": "ours: GhostNet's stages at width 0.5",
    "parameternet_150m": "ours: GhostNet's stages at width 1.0",
    "parameternet_300m": "reconstruction",
    "parameternet_600m": "official",
}


def create(name: str, **kwargs) -> torch.nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, num_classes=1000, **kwargs)


def parameters(model: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M"


def networks() -> list[str]:
    """A row per network: parameters with 4 experts and of the static baseline, MACs at 224 px and 1,000 classes."""
    rows = []
    for name, origin in ORIGIN.items():
        model = create(name)
        flops = count_flops(model)
        static = parameters(create(name, dynamic=False))
        macs = f"{flops.total / 1e6:.1f} M | {flops.mixing / 1e6:.1f} M"
        rows.append(f"| `{name}` | {origin} | {parameters(model)} | {static} | {macs} |")
    return rows


def upcycled() -> list[str]:
    """A row per network of timm: parameters dense and with 4 experts, MACs at its test size, accuracy if it has any."""
    rows = []
    for name, source in SOURCES.items():
        model, dense = create(name), create(name, dynamic=False)
        size = timm.data.resolve_data_config(pretrained_cfg=model.pretrained_cfg, use_test_size=True)["input_size"]
        macs = [f"{count_flops(network, size).total / 1e6:.0f} M" for network in (dense, model)]
        figures = [f"{figure:.2f}" if figure else "-" for figure in (source.top1, source.top5)]
        sizes = f"{parameters(dense)} | {parameters(model)} | {' | '.join(macs)}"
        rows.append(f"| `{name}` | {sizes} | {size[-1]} px | {' | '.join(figures)} |")
    return rows


DETECTORS = ("yolov8n", "yolo26n")
BACKBONES = ("parameternet_300m", "parameternet_600m", "dynamic_ghostnetv2_100", "dynamic_efficientnet_lite0")


def detectors() -> list[str]:
    """A row per detector: parameters, Ultralytics' GFLOPs at 640 px (convolutions), and our count of mixing on top."""
    if importlib.util.find_spec("ultralytics") is None:
        return []
    os.environ |= {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "YOLO_VERBOSE": "false"}
    import parameternet.yolo

    rows = []
    for stock in DETECTORS:
        for suffix in ("", *(f"-{name}" for name in (*parameternet.yolo.rules(), *BACKBONES))):
            model = parameternet.yolo.YOLO(f"{stock}{suffix}.yaml").model.eval()
            gflops = parameternet.yolo.gflops(model)
            mixing = 2 * count_flops(model, (3, 64, 64)).mixing / 1e9  # does not depend on the size
            rows.append(f"| `{stock}{suffix}.yaml` | {parameters(model)} | {gflops:.1f} | {mixing:.3f} |")
    return rows


def checkpoints(linked: bool = True) -> list[str]:
    """A row per checkpoint, from what its release measured; its name leads to its card."""
    rows = []
    for name in weights.known():
        config = weights.config(name)
        results, side = config["results"], config["pretrained_cfg"]["input_size"][-1]
        card = f"[`{name}`](weights/{name}/README.md)" if linked else f"`{name}`"
        rows.append(f"| {card} | Tiny-ImageNet | {side} px | {results['top1']:.2f} | {results['top5']:.2f} |")
    return rows


def routers() -> list[str]:
    """A row per checkpoint: the type of its routers."""
    rows = []
    for name in weights.known():
        config = weights.config(name)
        model = create(config["architecture"], **config["model_args"])
        router = next(module for module in model.modules() if isinstance(module, Router))
        rows.append(f"| `{name}` | {router.activation} | {'yes' if router.norm == 'layer' else 'no'} |")
    return rows


Row = dict[str, str]


PROCESSORS = {"avx2": "AVX2", "avx512": "AVX-512", "cuda": "GPU"}  # name of results -> what readers say


def measured(what: str) -> Iterator[tuple[str, list[Row]]]:
    """Processor and rows of each file that `speed.py --what WHAT` has written."""
    for processor, words in PROCESSORS.items():
        path = ROOT / "benchmarks" / "results" / f"{what}_{processor}.csv"
        if path.exists():
            yield words, read_csv(path)[1]


def speed() -> list[str]:
    """A row per batch size, inference and then training: milliseconds, ratios, memory."""
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for what in ("networks", "training"):
        for processor, rows in measured(what):
            for row in rows:
                key = (processor, row["mode"], row["dtype"], row["batch"])
                cases.setdefault(key, {})[row["contestant"]] = row
    return [_speed(key, found) for key, found in cases.items()]


def _speed(key: tuple[str, ...], found: dict[str, Row]) -> str:
    everybody = [found[name] for name in ("static", "condconv", "ours")]
    cells = ["{}, {}, {}, batch {}".format(*key)]
    cells += [f"{float(row['ms']):.1f} ms" if row["ms"] else "-" for row in everybody]
    cells += [_ratio(found["ours"], base) if found["ours"][f"vs_{base}"] else "-" for base in ("static", "condconv")]
    cells += [" / ".join(row["peak_mib"] for row in everybody) + " MiB"]
    return f"| {' | '.join(cells)} |"


def _ratio(row: Row, base: str) -> str:
    middle, low, high = (float(row[f"vs_{base}{end}"]) for end in ("", "_low", "_high"))
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def native_kernels() -> list[str]:
    """A row per network, mode and batch size: milliseconds of static, torch's operators and kernels, and ratios."""
    return _native("native", ("static", "torch", "native"), (("native", "static"), ("native", "torch")))


def native_channels_last() -> list[str]:
    """The same in channels last, and ours in contiguous memory."""
    ratios = ("native", "static"), ("native", "torch"), ("first", "static")
    return _native("native_channels_last", ("static", "torch", "native", "first"), ratios)


def _native(what: str, ways: Sequence[str], ratios: Sequence[tuple[str, str]]) -> list[str]:
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for processor, rows in measured(what):
        for row in rows:
            key = (processor, f"`{row['network']}`", row["mode"], f"batch {row['batch']}")
            cases.setdefault(key, {})[row["way"]] = row
    lines = []
    for key, found in cases.items():
        cells = [", ".join(key), *(f"{found[way]['ms']} ms" for way in ways)]
        cells += [f"{found[way][f'to {base}']} ({found[way][f'to {base}, quartiles']})" for way, base in ratios]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


THROUGHPUT = ("ours float32", "ours bfloat16", "static float32", "static bfloat16", "static bfloat16 channels last")


def throughput() -> list[str]:
    """A row per network and image size: images per second in training, ours and static."""
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for processor, rows in measured("throughput"):
        for row in rows:
            cases.setdefault((processor, f"`{row['network']}`", f"{row['side']} px"), {})[row["way"]] = row
    return [
        f"| {', '.join(key)} | {' | '.join(found[way]['images/s'] for way in THROUGHPUT)} |"
        for key, found in cases.items()
    ]


def training_time() -> list[str]:
    """A row per network and image size: shares of a training step by kind of operator."""
    lines = []
    for processor, rows in measured("throughput_profile"):
        for row in rows:
            shares = [f"{value} %" for name, value in row.items() if name not in ("network", "side", "batch")]
            lines.append(f"| {processor}, `{row['network']}`, {row['side']} px | {' | '.join(shares)} |")
    return lines


COMPILED = ("static", "static compiled", "ours", "ours compiled", "ours composite, compiled")


def compiled() -> list[str]:
    """A row per mode and batch size: milliseconds of each way to run the network, and ratios to static."""
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for processor, rows in measured("compiled"):
        for row in rows:
            cases.setdefault((processor, row["mode"], row["batch"]), {})[row["way"]] = row
    rows = []
    for key, found in cases.items():
        cells = ["{}, {}, batch {}".format(*key), *(f"{found[way]['ms']} ms" for way in COMPILED)]
        cells += [found["ours"]["times static"], found["ours compiled"]["times static compiled"]]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def layer_speed() -> list[str]:
    """A row per kind of layer: how long ours takes relative to CondConv2d, over all shapes and batch sizes."""
    kinds: dict[str, list[float]] = {}
    for processor, rows in measured("layers"):
        for row in rows:
            if row["contestant"] == "ours" and row["vs_condconv"]:
                kind = f"{processor}, {row['mode']}, {row['dtype']}, {row['case'].split(',')[0]}"
                kinds.setdefault(kind, []).append(float(row["vs_condconv"]))
    return [
        f"| {kind} | {len(ratios)} | {min(ratios):.2f} | {median(ratios):.2f} | {max(ratios):.2f} |"
        for kind, ratios in kinds.items()
    ]


def exported() -> list[str]:
    """A row per network and runtime: static, then relative to it each form; sizes and the largest difference of all."""
    cases: dict[tuple[str, str], dict[str, Row]] = {}
    path = ROOT / "benchmarks" / "results" / "export.csv"
    for row in read_csv(path)[1] if path.exists() else []:
        cases.setdefault((row["network"], row["runtime"]), {})[row["form"]] = row
    if not cases:
        return []
    forms = [form for form in next(iter(cases.values())) if form != "static"]
    names = ["network, runtime", "static", *forms, "file, static / ours", "difference"]
    head = [f"| {' | '.join(names)} |", "|" + " --- |" * len(names)]
    return head + [_exported(*key, found) for key, found in cases.items()]


def export_profile() -> list[str]:
    """A row per kind of node: milliseconds of the static baseline and of ours, and the difference."""
    path = ROOT / "benchmarks" / "results" / "export_profile.csv"
    rows = []
    for row in read_csv(path)[1] if path.exists() else []:
        static, ours = float(row["static, ms"]), float(row["ours, ms"])
        rows.append(f"| {row['kind']} | {static:.1f} | {ours:.1f} | {ours - static:+.1f} |")
    return rows


def int8() -> list[str]:
    """A row per network and format in 8 bits."""
    path = ROOT / "benchmarks" / "results" / "int8.csv"
    rows = []
    for row in read_csv(path)[1] if path.exists() else []:
        cells = (
            f"`{row['network']}`, {row['format']}", f"{row['MB']} MB ({row['of float32']})", row["same class, %"],
            row["top-1 lost"] or "-", f"{row['same expert, %']} ({row['in the worst layer']})",
            f"{row['ms']} / {row['ms in floats']} ms",
        )  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def int8_detectors() -> list[str]:
    """A row per detector and format in 8 bits."""
    path = ROOT / "benchmarks" / "results" / "int8_detectors.csv"
    rows = []
    for row in read_csv(path)[1] if path.exists() else []:
        pairs = (f"{row[key]} / {row[f'{key} in floats']}" for key in ("mAP50", "mAP50-95", "ms"))
        cells = (f"`{row['network']}`, {row['format']}", f"{row['MB']} MB ({row['of float32']})", *pairs)
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def mobile() -> list[str]:
    """A row per network and format of timmx, computed and constant kernels."""
    cases: dict[tuple[str, str], list[Row]] = {}
    path = ROOT / "benchmarks" / "results" / "mobile.csv"
    for row in read_csv(path)[1] if path.exists() else []:
        cases.setdefault((row["network"], row["format"]), []).append(row)
    return [
        f"| `{network}`, {format} | {' | '.join(_both(rows, key) for key in ('MB', 'difference', 'ms', 'result'))} |"
        for (network, format), rows in cases.items()
    ]


def _both(rows: list[Row], key: str) -> str:
    """What two forms have, once if it is the same."""
    return " / ".join(dict.fromkeys(row[key] or "-" for row in rows))


def bulk() -> list[str]:
    """A row per network that classified many images."""
    path = ROOT / "benchmarks" / "results" / "predict.csv"
    return [
        f"| `{row['network']}` | {int(row['images']):,} | {row['alone']} | {row['images/s']} | {row['kept']} "
        f"({row['quartiles']}) |"
        for row in (read_csv(path)[1] if path.exists() else [])
    ]


def peers() -> list[str]:
    """A row per layer, batch size and mode: times static of every layer that routes by itself."""
    path = ROOT / "benchmarks" / "results" / "peers.csv"
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in read_csv(path)[1] if path.exists() else []:
        cases.setdefault((row["shape"], row["batch"], row["mode"]), {})[row["layer"]] = row
    rows = []
    for (shape, batch, mode), found in cases.items():
        cin, cout, side, kernel, groups = shape.split("x")
        layer = f"{cin} → {cout}, {kernel} x {kernel}{', depthwise' if groups != '1' else ''}, {side} x {side}"
        times = [row["times static"] for name, row in found.items() if name != "static"]
        cells = (layer, batch, mode, f"{float(found['static']['ms']):.2f} ms", *times)
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def expert_dtypes() -> list[str]:
    """A row per network and dtype of its experts: size, times of float32, and agreement with float32."""
    path = ROOT / "benchmarks" / "results" / "expert_dtypes.csv"
    columns = ("MB", "to float32, batch 1", "to float32, batch 8", "top1", "same class", "logit difference")
    rows = []
    for row in read_csv(path)[1] if path.exists() else []:
        rows.append(f"| `{row['network']}`, {row['experts']} | {' | '.join(row[name] or '-' for name in columns)} |")
    return rows


def _exported(network: str, runtime: str, found: dict[str, Row]) -> str:
    static, forms = found["static"], [row for form, row in found.items() if form != "static"]
    worst = max(float(row[f"difference at batch {b}"] or 0) for row in found.values() for b in (1, 3, 8))
    cells = [f"`{network}`, {runtime}", f"{float(static['ms']):.1f} ms", *(row["times static"] for row in forms)]
    cells += [f"{static['MB']} / {forms[0]['MB']} MB", f"{worst:.0e}"]
    return f"| {' | '.join(cells)} |"


def compared(plan: str, name: str) -> list[str]:
    """A row per variant of a recipe, as `compare.py PLAN RECIPE --table` prints them."""
    recipe = ROOT / "configs" / "train" / f"{name}.yaml"
    result = ROOT / "benchmarks" / "results" / f"{recipe.stem}.csv"
    return compare.table(compare.PLANS[plan], load_recipe(recipe), result) if result.exists() else []


def recipe_fields() -> list[str]:
    """A row per field of a recipe: name, default, allowed values, documentation."""
    return [f"| {' | '.join(map(_cell, row))} |" for row in _fields()]


def _fields() -> Iterator[tuple[str, ...]]:
    for name, default, doc in Recipe.fields():
        shown = "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)
        yield f"`{name}`", f"`{shown}`", allowed(name), doc


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


class Table(NamedTuple):
    """Column names (None: the rows have them) and what makes the rows; no rows: what they need is not installed."""

    columns: str | None
    rows: Callable[[], list[str]]


TABLES = {
    "networks": Table("name | origin | parameters | static baseline | MACs at 224 px | of these mixing", networks),
    "upcycled": Table("name | dense | dynamic | MACs, dense | dynamic | input | top-1 | top-5", upcycled),
    "checkpoints": Table("checkpoint | data | input | top-1 | top-5", checkpoints),
    "weights": Table("checkpoint | data | input | top-1 | top-5", partial(checkpoints, linked=False)),
    "routers": Table("checkpoint | routers | normalised", routers),
    "speed": Table("case | static | CondConv2d | ours | to static | to CondConv2d | peak memory", speed),
    "native": Table("case | static | torch's operators | native kernels | to static | to torch's", native_kernels),
    "native-channels-last": Table(
        "case | static | torch's operators | native kernels | contiguous | native to static | native to torch's | "
        "contiguous to static",
        native_channels_last,
    ),
    "throughput": Table(
        "case | ours, float32 | ours, bfloat16 | static, float32 | static, bfloat16 | static, bfloat16, channels last",
        throughput,
    ),
    "training-time": Table(
        "case | batch norm | convolutions | matrix products | copies and casts | update | activations | the rest",
        training_time,
    ),
    "compiled": Table(
        "case | static | compiled | ours | compiled | composite, compiled | ours to static | both compiled", compiled
    ),
    "layers": Table("layers | cases | fastest | median | slowest", layer_speed),
    "export": Table(None, exported),
    "export-profile": Table("ms of one image | static | computed | difference", export_profile),
    "int8": Table(
        "network, format | file (of float32) | same class, % | top-1 lost | same expert, % (worst) | latency, float32",
        int8,
    ),
    "int8-detectors": Table(
        "network, format | file (of float32) | mAP50, float32 | mAP50-95, float32 | ms per image, float32",
        int8_detectors,
    ),
    "peers": Table("layer | batch | mode | static | ours | CondConv2d | ODConv | KernelWarehouse", peers),
    "expert-dtypes": Table(
        "network, experts | MB | time, batch 1 | time, batch 8 | top-1 | same class as float32, % | logit difference",
        expert_dtypes,
    ),
    "bulk": Table("network | images | network alone, images/s | prediction, images/s | kept", bulk),
    "mobile": Table("network, format | MB, computed / constant | difference | ms | result", mobile),
    "claim-50m": Table(None, partial(compared, "claim", "parameternet_50m_claim")),
    "claim-gpu": Table(None, partial(compared, "claim", "parameternet_50m_claim_gpu")),
    "claim-long": Table(None, partial(compared, "claim", "parameternet_50m_claim_long")),
    "claim-300m": Table(None, partial(compared, "claim", "parameternet_300m_cpu_tin200")),
    "transfer": Table(None, partial(compared, "transfer", "parameternet_600m_cifar10")),
    "freezing": Table(None, partial(compared, "freezing", "parameternet_50m_routers_cifar10")),
    "detectors": Table("network | parameters | GFLOPs | mixing", detectors),
    "recipe": Table("field | default | values | meaning", recipe_fields),
}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def text_of(name: str) -> str:
    """A table in Markdown; empty if it cannot be made here."""
    table = TABLES[name]
    rows = table.rows()
    if rows and table.columns:
        names = table.columns.split(" | ")
        rows = [f"| {' | '.join(names)} |", "|" + " --- |" * len(names), *rows]
    return "\n".join(rows)


def marked(name: str) -> re.Pattern[str]:
    """Find a table between its markers."""
    return re.compile(rf"(?<=<!-- table: {re.escape(name)} -->\n).*?(?=<!-- end -->)", re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="only these tables")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    pages = {path: path.read_text() for path in PAGES}
    named = {name for text in pages.values() for name in re.findall(r"<!-- table: (\S+) -->", text)}
    if unknown := named - TABLES.keys():
        raise SystemExit(f"no such table: {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}")
    stale = []
    for name in options.names or (named if options.write or options.check else TABLES):
        made = text_of(name)
        if not (options.write or options.check):
            print(f"{name}\n\n{made}\n")
            continue
        for path, text in pages.items() if made else ():
            pages[path] = marked(name).sub(lambda _, made=made: f"\n{made}\n\n", text, count=1)
            if pages[path] != text:
                stale.append(f"{path.relative_to(ROOT)}: {name}")
    if options.write:
        for path, text in pages.items():
            path.write_text(text)
    print("\n".join(stale))
    return int(options.check and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
