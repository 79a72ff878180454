"""Layout of the package: floors, import cost, what a wheel carries."""

import ast
import graphlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import parameternet
from parameternet import weights

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "parameternet"
# A room imports from lower floors and from rooms of its own floor without a circle, never from higher ones.
FLOORS = {
    "files": 1, "text": 1, "memory": 1, "deprecation": 1, "distributed": 1, "layers": 1,
    "weights": 2, "flops": 2, "optim": 2,
    "surgery": 3, "data": 3,
    "models": 4,
    "prediction": 5, "training": 5, "export": 5,
    "routing": 6, "yolo": 6, "diagnosis": 6,
    "hub": 7, "app": 7,
    "cli": 8,
    "__init__": 9, "__main__": 9,
}  # fmt: skip
OPTIONAL = {"ultralytics", "matplotlib", "onnx", "onnxruntime", "onnxscript", "openvino", "nncf", "tensorboard",
            "gradio", "pyarrow", "timmx", "ncnn", "pnnx", "litert_torch", "ai_edge_litert", "executorch",
            "coremltools"}  # fmt: skip


def imports(path):
    """(module, whether at the top level) of every import in a file, relative ones resolved."""
    tree = ast.parse(path.read_text())
    package = [*path.relative_to(ROOT).parent.parts]
    for node in ast.walk(tree):
        top = node in tree.body
        if isinstance(node, ast.Import):
            yield from ((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module, top
            yield from ((f"{node.module}.{alias.name}", top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] + ([node.module] if node.module else [])
            yield from ((".".join([*base, alias.name]), top) for alias in node.names)


def room(dotted):
    parts = dotted.split(".")
    return parts[1] if parts[0] == "parameternet" and len(parts) > 1 and parts[1] in FLOORS else None


SOURCES = sorted(p for p in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down_only(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert own in FLOORS, f"{own} has no floor: add it to FLOORS and to CONTRIBUTING.md"
    for module, top in imports(path):
        other = room(module)
        if other and other != own:
            assert FLOORS[other] <= FLOORS[own], f"{path.name} imports {module}, which is on a higher floor"
        allowed = {"ultralytics"} if own == "yolo" else set()
        assert not (top and module.split(".")[0] in OPTIONAL - allowed), f"{module} must be imported where it is used"


def test_long_files_are_justified():
    section = (ROOT / "docs" / "architecture.md").read_text().split("## Long files")[1]
    long = {str(path.relative_to(PACKAGE)) for path in SOURCES if len(path.read_text().splitlines()) > 350}
    assert long == set(re.findall(r"^\| `(\S+\.py)` \|", section, re.MULTILINE))


def test_modules_have_no_circular_imports():
    arrows = {}
    for path in SOURCES:
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        arrows.setdefault(own, set()).update({room(module) for module, _ in imports(path)} - {None, own})
    list(graphlib.TopologicalSorter(arrows).static_order())  # raises CycleError, which names the circle


TESTS = sorted(path for path in (ROOT / "tests").rglob("*.py"))


@pytest.mark.parametrize("path", TESTS, ids=lambda p: str(p.relative_to(ROOT / "tests")))
def test_tests_use_public_names_only(path):
    tree = ast.parse(path.read_text())
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "parameternet":
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
            assert not [name for name in names if is_private(name)], f"line {node.lineno}: {names}"
            modules |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".") if "parameternet" in alias.name]
            assert not [name for name in names if is_private(name)], f"line {node.lineno}: {names}"
            modules |= {alias.asname or "parameternet" for alias in node.names if "parameternet" in alias.name}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            base = ast.unparse(node.value).split(".")[0]
            assert base not in modules, f"line {node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("parameternet."):
            assert not [part for part in node.value.split(".") if is_private(part)], f"line {node.lineno}: {node.value}"


def is_private(name):
    named_tuple = {"_asdict", "_fields", "_make", "_replace"}
    return name.startswith("_") and not name.startswith("__") and name not in named_tuple


def test_import_is_light():
    code = (
        "import sys, time, timm; start = time.process_time(); import parameternet; spent = time.process_time() - start;"
        f"print(spent); print(*[m for m in {sorted(OPTIONAL)} if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    spent, loaded = run.stdout.split("\n")[:2]
    assert not loaded
    assert float(spent) < 0.3


def test_a_wheel_carries_configs_and_weights(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)],
        check=True,
    )
    assert next(tmp_path.glob("*.whl")).stat().st_size < 100e6, "the package index takes no larger file"
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        sizes = {info.filename: info.file_size for info in wheel.infolist()}
    expected = [p for kind in ("configs", "weights") for p in (ROOT / kind).rglob("*") if p.is_file()]
    assert expected
    for path in expected:
        name = f"parameternet/_shipped/{path.relative_to(ROOT).as_posix()}"
        assert sizes.get(name) == path.stat().st_size, name
    modules = {path.relative_to(ROOT).as_posix() for path in SOURCES}
    assert not modules - sizes.keys(), "setup.cfg names the packages of a wheel one by one"
    assert "parameternet/py.typed" in sizes and "parameternet/weights.json" in sizes
    unpacked = tmp_path / "unpacked"
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        wheel.extractall(unpacked)
    code = "from parameternet import weights; print(weights.shipped('configs')); print(weights.shipped('weights'))"
    run = subprocess.run([sys.executable, "-c", code], cwd=unpacked, capture_output=True, text=True, check=True)
    assert [Path(line).is_relative_to(unpacked) for line in run.stdout.split()] == [True, True]


def test_a_checkout_uses_its_own_folders():
    assert weights.shipped("configs") == ROOT / "configs" and weights.shipped("weights") == ROOT / "weights"


def test_versions_agree():
    texts = {name: (ROOT / name).read_text() for name in ("setup.cfg", "CITATION.cff", "CHANGELOG.md")}
    assert f"version = {parameternet.__version__}" in texts["setup.cfg"]
    assert f"version: {parameternet.__version__}" in texts["CITATION.cff"]
    assert f"## {parameternet.__version__}" in texts["CHANGELOG.md"]
