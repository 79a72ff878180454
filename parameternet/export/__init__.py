"""Export networks to other runtimes, and check each file by running it.

>>> export("parameternet_50m.tin200", "net.onnx").differences
{'batch 1, 64 x 64': 3e-07, 'batch 3, 64 x 64': 4e-07, 'batch 8, 64 x 64': 5e-07}
>>> read_metadata("net.onnx")["mean"]
[0.4802, 0.4481, 0.3978]

Files accept an empty batch, except those of form 'looped': onnxruntime and OpenVINO reject a loop with no iterations.
Skip empty batches before running such a file.
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

# Written by timmx, for a fixed batch size and a fixed image size (see `mobile.py`).
FIXED = ("ncnn", "litert", "executorch", "coreml", "tensorrt")
FORMATS = ("onnx", "torchscript", "torch_export", "openvino", *FIXED)
LOOPED = ("onnx", "openvino")


@dataclass(frozen=True)
class Exported:
    """The result of an export: the `files` (two for OpenVINO), their size in `bytes`, and the outcome of the check.

    `differences` holds the largest relative difference from the network for each input. For int8 exports, it describes
    the float32 file before quantisation, and `int8` is the report. If the file was not run, `differences` is empty and
    `unchecked` gives the reason.
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
    """Export a network to another runtime, and keep the file only if its outputs match the network's.

    The network itself is not modified: a copy is fused (`parameternet.surgery.fuse`) and written in float32. The file
    is run at batch sizes 1, 3 and 8, or at the fixed one, and with `dynamic_size` also at a second image size. Its
    outputs are compared with the network's. Core ML and TensorRT files are not run; a warning says so.

    Args:
        model: Anything that `parameternet.models.loading.parse_source` accepts, or any network, also an upcycled one.
        path: The output file, in an existing folder. None: the network's name with the format's suffix, in the current
            folder.
        format: A name in `FORMATS`. openvino writes two files, NAME.xml and NAME.bin; ncnn writes NAME.param and
            NAME.bin; coreml writes a folder. Formats in `FIXED` require `batch`, and store their metadata in a separate
            file next to the output.
        form: How kernels are written (see `forms.py`): 'computed'; 'constant', for runtimes that accept only constant
            kernels, such as TensorRT; or 'looped', for ONNX and OpenVINO only.
        batch: Batch size; must be 1 for ncnn. None: any batch size, but at least 1 in files of form 'looped'.
        size: Input size: one number for height and width, (height, width), or (channels, height, width). None: the size
            at which the network is evaluated.
        dynamic_size: Allow any height and width; the file is then tuned for `size`.
        opset: ONNX opset, for ONNX and OpenVINO; None: 18.
        int8: A folder or tar of at least 200 images like those that the network will see, with one folder per class if
            they are labelled. The file is quantised to int8 (ONNX and OpenVINO; see `int8.py`) and compared with the
            float32 file on images that were not used for calibration; the report is written next to it as
            FILE.int8.json.
        calibration_images: Number of images to calibrate with, at most three quarters of all; up to 1,000 others are
            used for the report.

    Raises:
        ExportError: the export fails, or the file differs by more than 1e-4; `path` is left unchanged.
        ValueError: an unsupported format, form, batch or size, or outputs that a file cannot represent.
        DataError: too few images for `int8`.
        ModuleNotFoundError: a package is missing; `pip install 'parameternet[export]'`, or `[mobile]` for `FIXED`.
    """
    writer = _writer(format)
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}; there are {', '.join(FORMS)}")
    if form == "looped" and format not in LOOPED:
        raise ValueError(f"form 'looped' requires format {' or '.join(LOOPED)}, got {format!r}; use form 'computed'")
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
        raise ValueError(f"opset requires format {' or '.join(LOOPED)}, got opset {opset} with format {format!r}")


def _check_fixed(format: str, batch: int | None, dynamic_size: bool) -> None:
    if format not in FIXED:
        return
    if format == "ncnn" and batch != 1:
        raise ValueError(f"ncnn takes one image at a time, got batch {batch or 'any'}; give batch 1")
    if batch is None:
        raise ValueError(f"format {format!r} requires a fixed batch size: set batch, for example to 1")
    if dynamic_size:
        raise ValueError(f"format {format!r} requires a fixed image size: remove dynamic_size")


def _check_int8(images: str | Path | None, format: str, form: str, number: int) -> None:
    if images is None:
        return
    if format not in INT8_FORMATS or form == "looped":
        raise ValueError(
            f"int8 requires format {' or '.join(INT8_FORMATS)} and form 'computed' or 'constant', got format "
            f"{format!r} and form {form!r}"
        )
    if number < 1:
        raise ValueError(f"calibration_images must be at least 1, got {number}")


def _quantise(writer: ModuleType, path: Path, plan: Plan, images: Images) -> dict[str, Any]:
    """Replace the float32 file with its int8 version, and write the report next to it."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        target = Path(folder) / path.name
        try:
            report = {"format": writer.__name__.rpartition(".")[2], "form": plan.form}
            report |= quantise(writer, path, target, images, plan.batch)
        except (ModuleNotFoundError, DataError, OSError):
            raise
        except Exception as error:  # every quantiser raises its own exception types
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
    """Return a copy for inference, on the CPU in float32, with adapters merged."""
    network = deepcopy(model) if isinstance(model, nn.Module) else load(model).model
    network = network.eval().cpu().float()
    if hasattr(network, "merge_and_unload"):  # a network with PEFT adapters
        network = network.merge_and_unload()
    compact = next((module for module in network.modules() if isinstance(module, CompactConv)), None)
    if compact is not None:
        raise ValueError(
            f"the experts of this network are stored as {compact.expert_dtype}, which no export format supports: "
            "export the network without `fuse(expert_dtype=...)`; for a small file, pass calibration images as `int8`"
        )
    takes = inspect.signature(network.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in takes):
        network = _OneInput(network).eval()
    return network.requires_grad_(False)


class _OneInput(nn.Module):
    """A wrapper with one input, for a network whose `forward(*args)` does not tell exporters how many it takes."""

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
        raise ValueError(
            "the network does not specify its input size: give size as (height, width) or (channels, height, width)"
        )
    given = (size, size) if isinstance(size, int) else tuple(size or usual[1:])
    if len(given) not in (2, 3) or min(given) < 1:
        raise ValueError(f"size must be a number, (height, width) or (channels, height, width), got {size}")
    return given if len(given) == 3 else (input_channels(model, *given), *given)


def check_output(path: str | Path | None, format: str) -> None:
    """Check that `export` can write to `path`, or to the current folder if it is None.

    Raises:
        ValueError: an unknown format, a suffix of another format, or a folder that is not writable.
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
        raise ValueError("the network has no name to derive the file name from: give a path")
    return Path(re.sub(r"[^\w.-]", "_", facts["name"]) + writer.SUFFIX)  # a name in a config may contain a path


def _write(writer: ModuleType, model: nn.Module, path: Path, plan: Plan) -> None:
    try:
        writer.write(model, path, plan)
    except (ModuleNotFoundError, OSError, ExportError):
        raise
    except Exception as error:  # every exporter raises its own exception types
        free = [words for words, yes in (("batch", plan.batch is None), ("size", plan.dynamic_size)) if yes]
        hint = f"; try a fixed {' and '.join(free)}" if free else ""
        reason = str(error).strip().partition("\n")[0]  # the other lines print the program
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
    except Exception as error:  # every runtime raises its own exception types
        raise ExportError(f"the file cannot be read by its runtime: {error}") from error
    return differences(network, run, batches, sizes)


def _keep(made: list[Path], path: Path) -> list[Path]:
    """Move `made` (`path` and the files next to it) over the files of an earlier export.

    If the export fails, nothing changes. If it is killed while renaming, `path` is missing rather than combined with
    files of another export.
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
            report.unlink(missing_ok=True)  # it describes the earlier file
    return [path.parent / file.name for file in made]


@contextmanager
def _replacing(path: Path, file: Path) -> Iterator[None]:
    """Replace `path` with a file or folder when the block ends without an error."""
    if file.is_dir():
        yield
        file.rename(path)
        return
    with open(file, "rb") as source, atomic_write(path) as target:
        shutil.copyfileobj(source, target)
        yield


def _size_in_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())
