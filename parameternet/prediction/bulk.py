"""Classify many images into a file; a killed run resumes, and torchrun processes share the work."""

import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from parameternet import weights
from parameternet.data.errors import ImageError
from parameternet.data.listing import Listing
from parameternet.distributed import choose_device, join, local_rank
from parameternet.files import remove_leftovers
from parameternet.prediction.parts import Answer, Parts
from parameternet.prediction.predictor import Predictor, Preprocess, Result
from parameternet.prediction.rows import check_output, errors_of, write_errors, write_rows

__all__ = ["Summary", "predict_to_file"]

PATIENCE = timedelta(days=30)  # a process may wait for slower ones until the last image


class Summary(NamedTuple):
    """The output of a bulk prediction.

    images: Rows of `output`.
    resumed: Images predicted by an earlier, interrupted run.
    unreadable: Rows of `errors`, a CSV of paths and reasons; None if every image could be read.
    notes: Sentences about files skipped in the sources.
    """

    output: Path
    images: int
    resumed: int
    unreadable: int
    errors: Path | None
    notes: list[str]


def predict_to_file(
    model: str | Path | nn.Module | None,
    sources: Iterable[str | Path],
    output: str | Path,
    *,
    topk: int = 5,
    batch_size: int = 64,
    workers: int | None = None,
    device: str | torch.device | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Summary | None:
    """Classify every image of `sources` into `output`, one row per image, in the order of `Listing`.

    While running, predictions are kept in the folder `OUTPUT.parts`; after a kill, the same call resumes from it. The
    number of processes, batch size and device may differ then. Images that cannot be read are listed in
    `OUTPUT.errors.csv`.

    Args:
        model, device: As in `Predictor`; under torchrun, `cuda` is each process's own GPU.
        sources: As in `Listing`.
        output: A .csv, .jsonl or .parquet file that does not exist.
        topk: Classes per image; all if there are fewer.
        batch_size: Images per forward pass.
        workers: Data loading workers; None: one fewer than this process's cores, at most 8.
        progress: Called in the first process with (images done, images) of its share.

    Returns:
        A summary of the files written; None in all torchrun processes but the first.

    Raises:
        ValueError: the output cannot be written or belongs to another setup, there is no such device, there are no
            images, or processes see different images.
        ModuleNotFoundError: the format needs a package that is not installed.
        Locked: another process writes the output.
        WeightsError: the weights are missing or invalid.
    """
    if topk < 1 or batch_size < 1:
        raise ValueError(f"topk and batch_size must be at least 1, got {topk} and {batch_size}")
    output = Path(output)
    check_output(output)
    parts = Parts(output)
    parts.check()
    with join(choose_device(device, local_rank()), patience=PATIENCE) as here, ExitStack() as held:
        predictor = Predictor(model, here.device)
        topk = min(topk, len(predictor.labels))
        listing = Listing(sources)
        setup = _setup(predictor, listing, topk)
        if any(other != setup for other in here.gather(setup)):
            raise ValueError("the processes see different images or models; give all hosts the same ones")
        here.agreed(lambda: held.enter_context(parts.begin(setup)))
        parts.check_shared()
        known = parts.known()
        here.wait()  # before any process adds to the parts that others count
        left = [index for index in range(len(listing)) if index not in known]
        mine = left[here.rank :: here.world]
        with parts.append() as writer:
            done = 0
            for answers in _answers(predictor, listing, mine, topk, batch_size, _workers(workers)):
                writer.write(answers)
                done += len(answers)
                if here.first and progress:
                    progress(done, len(mine))
        here.wait()
        return _finish(predictor, listing, parts, topk, len(known)) if here.first else None


def _workers(given: int | None) -> int:
    if given is not None:
        return given
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1))


def _setup(predictor: Predictor, listing: Listing, topk: int) -> dict[str, Any]:
    """Return everything that the rows depend on."""
    return {
        "model": predictor.name,
        "digest of the weights": weights.tensors_digest(predictor.model.state_dict()),
        "preprocessing": repr(predictor.transform),
        "digest of the class names": weights.text_digest(json.dumps(predictor.labels)),
        "topk": topk,
        "number of images": len(listing),
        "digest of the images' names and sizes": listing.digest(),
    }


# ---------------------------------------------------------------------------------------------------------------------
# One process's share
# ---------------------------------------------------------------------------------------------------------------------


class _Inputs(Dataset):
    """Return the network's input for each index, or why there is none."""

    def __init__(self, listing: Listing, indices: list[int], preprocess: Preprocess) -> None:
        self.listing, self.indices, self.preprocess = listing, indices, preprocess

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> tuple[int, Tensor | str]:
        index = self.indices[place]
        try:
            return index, self.preprocess(self.listing.read(index))
        except ImageError as error:
            return index, error.reason
        except Exception as error:  # an image that decodes but cannot be resized, such as 1 x 60,000 pixels
            return index, f"cannot be prepared for the network: {str(error) or type(error).__name__}"


class _Batch(NamedTuple):
    indices: list[int]
    inputs: Tensor | None  # of those that have no error
    errors: dict[int, str]


def _collate(items: list[tuple[int, Tensor | str]]) -> _Batch:
    tensors = [found for _, found in items if isinstance(found, Tensor)]
    errors = {index: found for index, found in items if isinstance(found, str)}
    return _Batch([index for index, _ in items], torch.stack(tensors) if tensors else None, errors)


def _answers(
    predictor: Predictor, listing: Listing, indices: list[int], topk: int, batch_size: int, workers: int
) -> Iterator[list[Answer]]:
    """Yield the predictions of each batch, indices ascending."""
    workers = min(workers, len(indices))
    loader = DataLoader(
        _Inputs(listing, indices, predictor.preprocess),
        batch_size=batch_size,
        num_workers=workers,
        prefetch_factor=4 if workers else None,  # enough for a small variation of batch times
        collate_fn=_collate,
        worker_init_fn=_ignore_interrupt,
        pin_memory=predictor.device.type == "cuda",
    )
    parent = os.getppid()
    for batch in loader:
        found = iter(predictor.classify(batch.inputs, topk) if batch.inputs is not None else [])
        yield [_answer(index, batch.errors.get(index), found) for index in batch.indices]
        if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != parent:
            raise RuntimeError("torchrun ended; this process stops, so that a new run can resume")


def _answer(index: int, error: str | None, found: Iterator[tuple[list[float], list[int]]]) -> Answer:
    if error is not None:
        return Answer(index, [], [], error)
    probabilities, classes = next(found)
    return Answer(index, classes, probabilities)


def _ignore_interrupt(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches workers too, but the process itself stops them


# ---------------------------------------------------------------------------------------------------------------------
# The files
# ---------------------------------------------------------------------------------------------------------------------


def _finish(predictor: Predictor, listing: Listing, parts: Parts, topk: int, resumed: int) -> Summary:
    """Write the errors, then the rows, then remove the parts, so that a run killed in between can resume."""
    output = parts.output
    errors = errors_of(output)
    remove_leftovers(output)
    remove_leftovers(errors)
    failed = [Result(listing.names[found.index], error=found.error) for found in parts.merged() if found.error]
    missing = len(listing) - sum(1 for _ in parts.merged())
    if missing:
        raise RuntimeError(f"{missing} images have no prediction in {parts.folder}; run the same command again")
    if failed:
        write_errors(errors, failed)
    else:
        errors.unlink(missing_ok=True)  # from another run, whose output was deleted
    write_rows(output, (_result(predictor, listing, found) for found in parts.merged() if not found.error), topk)
    parts.remove()
    return Summary(output, len(listing) - len(failed), resumed, len(failed), errors if failed else None, listing.notes)


def _result(predictor: Predictor, listing: Listing, answer: Answer) -> Result:
    labels = [predictor.labels[index] for index in answer.classes]
    return Result(listing.names[answer.index], labels, answer.probabilities, answer.classes)
