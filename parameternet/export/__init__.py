"""Networks as files for other runtimes, checked by running the file.

>>> export("parameternet_50m.tin200", "net.onnx").differences
{'batch 1, 64 x 64': 3e-07, 'batch 3, 64 x 64': 4e-07, 'batch 8, 64 x 64': 5e-07}
>>> read_metadata("net.onnx")["mean"]
[0.4802, 0.4481, 0.3978]

A batch of no images runs in every file but those of form 'looped': onnxruntime and OpenVINO refuse a loop of no turns,
so skip an empty batch before you run such a file.
"""

import importlib
import inspect
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from parameternet.data.errors import DataError
from parameternet.export.checking import BATCHES, ExportError, check_tensors, differences
from parameternet.export.forms import FORMS
from parameternet.export.int8 import FORMATS as INT8_FORMATS
from parameternet.export.int8 import Images, quantise
from parameternet.export.metadata import config_of, describe, input_channels, read_metadata
from parameternet.export.plan import Plan
from parameternet.files import atomic_write, check_file, check_folder, write_json
from parameternet.layers.compact import CompactConv
from parameternet.models.loading import load
from parameternet.surgery import fuse

__all__ = ["FIXED", "FORMATS", "FORMS", "ExportError", "Exported", "check_output", "export", "read_metadata"]

# Written by timmx, for one batch and one size of images (see `mobile.py`).
FIXED = ("ncnn", "litert", "executorch", "coreml", "tensorrt")
FORMATS = ("onnx", "torchscript", "torch_export", "openvino", *FIXED)
LOOPED = ("onnx", "openvino")


@dataclass(frozen=True)
class Exported:
    """What was written: `files` (OpenVINO has two), their size in `bytes`, the largest relative difference by input.

    With 8 bits the differences are those of the file in floats that was quantised, and `int8` is the report. If the
    file was not run, `differences` is empty, and `unchecked` says why.
    """

    path: Path
    files: list[Path]
    bytes: int
    format: str
    form: str
    batch: int | None
    dynamic_size: bool
    differences: dict[str, float]
    int8: dict[str, Any] | None = None
    unchecked: str | None = None


def export(
    model: nn.Module | str | Path,
    path: str | Path | None = None,
    format: str = "onnx",
    *,
    form: str = "computed",
    batch: int | None = None,
    size: int | tuple[int, int] | tuple[int, int, int] | None = None,
    dynamic_size: bool = False,
    opset: int | None = None,
    int8: str | Path | None = None,
    calibration_images: int = 300,
) -> Exported:
    """Write a network as a file for another runtime, and keep it only if it computes what the network does.

    The network itself stays as it is: a copy is fused (`parameternet.surgery.fuse`) and written in 32-bit floats. The
    file is run at batches 1, 3 and 8, or the fixed one, and with `dynamic_size` at another size too, and held against
    the network. Core ML and TensorRT files are not run; a warning says so.

    Args:
        model: As for `parameternet.models.loading.parse_source`, or any network, also one that was upcycled.
        path: The file; None: the network's name with the format's ending, in the current folder. Its folder must exist.
        format: A name in `FORMATS`. openvino writes two files, NAME.xml and NAME.bin; ncnn NAME.param and NAME.bin;
            coreml a folder. Formats in `FIXED` need a `batch`, and have their metadata in a file next to them.
        form: 'computed' kernels, 'constant' ones for runtimes that take no others, like TensorRT, or 'looped', for ONNX
            and OpenVINO only (see `forms.py`).
        batch: Images at once, for ncnn 1; None: any number, but at least 1 in files of form 'looped'.
        size: Height and width of the input (a number: both), or with the channels before; None: what the network is
            evaluated at.
        dynamic_size: Leave height and width free; `size` is then the one that the file is tuned for.
        opset: Version of ONNX's operators, for ONNX and OpenVINO; None: 18.
        int8: A folder or tar of at least 200 images like those that the network will see, one folder a class if they
            are labelled: the file is written in 8 bits (ONNX and OpenVINO; see `int8.py`), compared with the one in
            floats on images that were not used for calibration, and the report written next to it as FILE.int8.json.
        calibration_images: How many of them calibrate, at most three quarters; up to 1,000 others are for the report.

    Raises:
        ExportError: it cannot be written, or the file differs by more than 1e-4; `path` is not changed.
        ValueError: a format, form, batch or size that there is not, or outputs that no file can have.
        DataError: too few images for `int8`.
        ModuleNotFoundError: a package is missing; `pip install 'parameternet[export]'`, or `[mobile]` for `FIXED`.
    """
    writer = _writer(format)
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; there are {', '.join(FORMS)}")
    if form == "looped" and format not in LOOPED:
        raise ValueError(f"form 'looped' is for {' and '.join(LOOPED)}, got format {format!r}; use form 'computed'")
    if batch is not None and batch < 1:
        raise ValueError(f"batch must be None (free) or at least 1, got {batch}")
    _check_opset(format, opset)
    _check_fixed(format, batch, dynamic_size)
    _check_int8(int8, format, form, calibration_images)
    check_output(path, format)
    network = _prepared(model)
    size = _size(network, size)
    check_tensors(network, size)
    images = None if int8 is None else Images.find(int8, network, calibration_images, size)
    facts = describe(network, size, verified=not isinstance(model, nn.Module))
    facts |= {"form": form, "batch": batch or "free", "dynamic_size": dynamic_size}
    facts["precision"] = "float32" if images is None else "int8"
    plan = Plan(form, batch, size, dynamic_size, opset, facts, images is not None)
    path = _default_path(facts, writer) if path is None else Path(path)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        written = Path(folder) / path.name
        _write(writer, fuse(network), written, plan)
        found = _check(network, writer, written, plan)
        report = None
        if images is not None:
            report = _quantise(writer, written, plan, images)
        files = _keep(sorted(Path(folder).iterdir()), path)
    unchecked = getattr(writer, "UNCHECKED", None)
    if unchecked:
        warnings.warn(f"{path.name} was not compared with the network: {unchecked}", stacklevel=2)
    size_in_bytes = sum(_size_in_bytes(file) for file in files if file.suffix != ".json")
    return Exported(path, files, size_in_bytes, format, form, batch, dynamic_size, found, report, unchecked)


def _check_opset(format: str, opset: int | None) -> None:
    if opset is not None and format not in LOOPED:
        raise ValueError(f"opset is for {' and '.join(LOOPED)}, got opset {opset} with format {format!r}")


def _check_fixed(format: str, batch: int | None, dynamic_size: bool) -> None:
    if format not in FIXED:
        return
    if format == "ncnn" and batch != 1:
        raise ValueError(f"ncnn takes one image at a time, got batch {batch or 'any'}; give batch 1")
    if batch is None:
        raise ValueError(f"files of format {format!r} take one batch size only: give batch, for example 1")
    if dynamic_size:
        raise ValueError(f"files of format {format!r} take one size of images only: leave dynamic_size out")


def _check_int8(images: str | Path | None, format: str, form: str, number: int) -> None:
    if images is None:
        return
    if format not in INT8_FORMATS or form == "looped":
        raise ValueError(
            f"int8 is for the formats {' and '.join(INT8_FORMATS)} and the forms computed and constant, got format "
            f"{format!r} and form {form!r}"
        )
    if number < 1:
        raise ValueError(f"calibration_images must be at least 1, got {number}")


def _quantise(writer: ModuleType, path: Path, plan: Plan, images: Images) -> dict[str, Any]:
    """Put the file in 8 bits in the place of the one in floats, with its report."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        target = Path(folder) / path.name
        try:
            report = {"format": writer.__name__.rpartition(".")[2], "form": plan.form}
            report |= quantise(writer, path, target, images, plan.batch)
        except (ModuleNotFoundError, DataError, OSError):
            raise
        except Exception as error:  # every quantiser has its own kinds
            raise ExportError(f"the quantiser failed with {type(error).__name__}: {str(error).strip()}") from error
        for file in Path(folder).iterdir():
            file.replace(path.parent / file.name)
    write_json(_report_path(path), report)
    return report


def _report_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.int8.json")


def _writer(format: str) -> ModuleType:
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; there are {', '.join(FORMATS)}")
    return importlib.import_module(f"parameternet.export.{format}")


def _prepared(model: nn.Module | str | Path) -> nn.Module:
    """A copy for inference on the CPU in 32-bit floats, with adapters merged."""
    network = deepcopy(model) if isinstance(model, nn.Module) else load(model).model
    network = network.eval().cpu().float()
    if hasattr(network, "merge_and_unload"):  # a network with adapters of peft
        network = network.merge_and_unload()
    compact = next((module for module in network.modules() if isinstance(module, CompactConv)), None)
    if compact is not None:
        raise ValueError(
            f"the experts of this network are stored in {compact.expert_dtype}, which no file format holds: export the "
            "network without `fuse(expert_dtype=...)`; for a small file, give `int8` images to calibrate with"
        )
    takes = inspect.signature(network.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in takes):
        network = _OneInput(network).eval()
    return network.requires_grad_(False)


class _OneInput(nn.Module):
    """A network whose `forward(*args)` does not say how many inputs it takes, which exporters want to know."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        for name in ("pretrained_cfg", "num_classes", "in_chans"):
            if hasattr(network, name):
                setattr(self, name, getattr(network, name))

    def forward(self, x: Tensor) -> Any:
        return self.network(x)


def _size(model: nn.Module, size: int | tuple[int, ...] | None) -> tuple[int, int, int]:
    cfg = config_of(model)
    usual = tuple(cfg.get("test_input_size") or cfg.get("input_size") or ())
    if size is None and not usual:
        raise ValueError("the network does not say which size it reads: give size, (height, width) or with channels")
    given = (size, size) if isinstance(size, int) else tuple(size or usual[1:])
    if len(given) not in (2, 3) or min(given) < 1:
        raise ValueError(f"size must be a number, (height, width) or (channels, height, width), got {size}")
    return given if len(given) == 3 else (input_channels(model, *given), *given)


def check_output(path: str | Path | None, format: str) -> None:
    """Check that `export` can write to `path`; None: to the current folder.

    Raises:
        ValueError: an unknown format, a suffix of another one, or a folder that cannot be written.
    """
    if path is None:
        return check_folder(Path())
    path, writer = Path(path), _writer(format)
    if path.suffix != writer.SUFFIX:
        raise ValueError(f"the file must end in {writer.SUFFIX}, got {path.name}")
    if path.is_dir() and getattr(writer, "IS_FOLDER", False):
        return check_folder(path.parent)  # an earlier export is replaced
    check_file(path)


def _default_path(facts: dict[str, Any], writer: ModuleType) -> Path:
    if not facts.get("name"):
        raise ValueError("the network has no name to call the file by: give a path")
    return Path(re.sub(r"[^\w.-]", "_", facts["name"]) + writer.SUFFIX)  # a config may name any folder


def _write(writer: ModuleType, model: nn.Module, path: Path, plan: Plan) -> None:
    try:
        writer.write(model, path, plan)
    except (ModuleNotFoundError, OSError, ExportError):
        raise
    except Exception as error:  # every exporter has its own kinds
        free = [words for words, yes in (("batch", plan.batch is None), ("size", plan.dynamic_size)) if yes]
        hint = f"; try a fixed {' and '.join(free)}" if free else ""
        reason = str(error).strip().partition("\n")[0]  # the rest is a listing of the program
        raise ExportError(f"the exporter failed with {type(error).__name__}: {reason}{hint}") from error


def _check(network: nn.Module, writer: ModuleType, path: Path, plan: Plan) -> dict[str, float]:
    if hasattr(writer, "UNCHECKED"):
        return {}
    sizes = [plan.size]
    if plan.dynamic_size:
        channels, height, width = plan.size
        # Neither square nor of the same parity nor a multiple of the stride.
        sizes.append((channels, height + 37, width + 70))
    batches = [plan.batch] if plan.batch else BATCHES
    try:
        run = writer.runner(path)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # every runtime has its own kinds
        raise ExportError(f"the file cannot be read by its runtime: {error}") from error
    return differences(network, run, batches, sizes)


def _keep(made: list[Path], path: Path) -> list[Path]:
    """Put `made`, which are `path` and files next to it, in place of those of an earlier export.

    An export that fails changes nothing. One that is killed while renaming leaves no `path`: it would be read with
    files that belong to another one.
    """
    others = [file for file in made if file.name != path.name]
    report = _report_path(path)
    with ExitStack() as renamed:  # in reverse order, so `path` comes last
        for file in (made[0].with_name(path.name), *others):
            renamed.enter_context(_replacing(path.parent / file.name, file))
        if path.is_dir():  # a folder cannot be renamed over another one
            path.rename(made[0].with_name(f"{path.name}.old"))  # on the same disk; removed with the temporary folder
        elif others:
            Path(os.path.realpath(path)).unlink(missing_ok=True)
        if report.name not in {file.name for file in others}:
            report.unlink(missing_ok=True)  # it is about the earlier file
    return [path.parent / file.name for file in made]


@contextmanager
def _replacing(path: Path, file: Path) -> Iterator[None]:
    """Put a file or folder in place of `path` when the block ends without an error."""
    if file.is_dir():
        yield
        file.rename(path)
        return
    with open(file, "rb") as source, atomic_write(path) as target:
        shutil.copyfileobj(source, target)
        yield


def _size_in_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
