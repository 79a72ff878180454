"""Where does an exported network spend its time, compared with its static baseline?

    python benchmarks/export_profile.py                        parameternet_600m at 224 px, a minute

Both networks are exported to ONNX with a batch of 1 and run in onnxruntime on one thread, taking turns, with
onnxruntime's own profiler. Each node counts with the median of its times. Results go to
benchmarks/results/export_profile.csv.
"""

import argparse
import json
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from statistics import median

import numpy as np
import onnx
import onnxruntime
import timm
import torch
from _timing import ROOT, header, write_csv

import parameternet  # noqa: F401  registers the networks
from parameternet.export import export

RESULT = ROOT / "benchmarks" / "results" / "export_profile.csv"
KINDS = ("routing", "mixing", "depthwise convolutions", "other convolutions", "activations", "the rest")
ACTIVATIONS = ("HardSwish", "HardSigmoid", "Relu", "Sigmoid")
WARM_UP = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="parameternet_600m")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=31)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = {form: exported(options, form, Path(folder)) for form in ("static", "computed")}
        times = {form: by_kind(paths[form], events) for form, events in profiles(paths, options).items()}
    rows = []
    for kind in (*KINDS, "all"):
        static, ours = (sum(t.values()) if kind == "all" else t[kind] for t in times.values())
        rows.append(
            {"network": options.network, "kind": kind, "static, ms": f"{static:.2f}", "ours, ms": f"{ours:.2f}"}
        )
        print(*rows[-1].values(), sep="\t")
    write_csv(RESULT, [*header(1, "cpu"), f"onnxruntime {onnxruntime.__version__}"], rows)


def exported(options: argparse.Namespace, form: str, folder: Path) -> Path:
    torch.manual_seed(0)
    model = timm.create_model(options.network, num_classes=1000, dynamic=form != "static")
    path = folder / f"{form}.onnx"
    export(model, path, "onnx", form="constant" if form == "static" else form, batch=1, size=options.size)
    return path


def profiles(paths: dict[str, Path], options: argparse.Namespace) -> dict[str, list[dict]]:
    """Run the files in turn, and return the events of their nodes after warming up."""
    sessions = {}
    for form, path in paths.items():
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads, settings.enable_profiling = 1, True
        settings.profile_file_prefix = str(path.with_suffix(""))
        sessions[form] = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
    x = np.random.default_rng(0).standard_normal((1, 3, options.size, options.size)).astype(np.float32)
    for _ in range(WARM_UP + options.rounds):
        for session in sessions.values():
            session.run(None, {session.get_inputs()[0].name: x})
    found = {}
    for form, session in sessions.items():
        events = json.loads(Path(session.end_profiling()).read_text())
        nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
        found[form] = nodes[len(nodes) * WARM_UP // (WARM_UP + options.rounds) :]
    return found


def by_kind(path: Path, events: list[dict]) -> Counter[str]:
    """Add up milliseconds by kind of node."""
    graph = onnx.load(path).graph
    constants, nodes = {i.name for i in graph.initializer}, {node.name: node for node in graph.node}
    times: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        name = event["name"].removesuffix("_kernel_time")
        times[name, kind_of(name, event["args"], nodes, constants)].append(event["dur"] / 1e3)
    total: Counter[str] = Counter()
    for (_, kind), spent in times.items():
        total[kind] += median(spent)
    return total


def kind_of(name: str, facts: dict, nodes: dict[str, onnx.NodeProto], constants: set[str]) -> str:
    """Return the kind of a node; onnxruntime adds to the names of those that it rewrites."""
    if "routing" in name:
        return "routing"
    if facts["op_name"] == "Conv":
        if name in nodes and nodes[name].input[0] in constants:
            return "mixing"  # a 1 x 1 convolution of the experts by the routing weights
        kernel = next(iter(facts["input_type_shape"][1].values()))
        return "depthwise convolutions" if kernel[1] == 1 and kernel[0] > 1 else "other convolutions"
    return "activations" if facts["op_name"] in ACTIVATIONS else "the rest"


if __name__ == "__main__":
    main()
