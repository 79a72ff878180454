"""Moved in 0.2; these names work for one more release."""

from parameternet.deprecation import moved

BATCHES = ("EvalBatches", "Images", "Key", "TrainBatches", "collate")
LOADERS = (
    "Report", "Reported", "eval_loader", "make_loader", "stop_workers", "stream_loader", "train_transform_arguments",
    "train_transforms",
)  # fmt: skip

__getattr__ = moved(
    __name__,
    {name: f"parameternet.training.batches:{name}" for name in BATCHES}
    | {name: f"parameternet.training.loaders:{name}" for name in LOADERS}
    | {"check_classes": "parameternet.training.datasets:check_classes"},
)
