"""Names of 0.1.0 that moved still work, with a warning that names the new place."""

import importlib

import pytest

MOVED = {
    "checkpoint": {"read_weights": "parameternet.models.loading:read_tensors"},
    "recipe": {"Rule": "fields"},
    "validate": {"read_config": "parameternet.models.loading"},
    "sources": dict.fromkeys(["classes_of", "is_stream", "open_dataset"], "parameternet.data.sources"),
    "engine": {"Progress": "meters", "StopSignals": "signals", "Trainer": "trainer", "run": "trainer"},
    "data": {
        **dict.fromkeys(["EvalBatches", "Images", "Key", "TrainBatches", "collate"], "batches"),
        **dict.fromkeys(["Report", "Reported", "eval_loader", "make_loader", "stop_workers"], "loaders"),
        **dict.fromkeys(["stream_loader", "train_transform_arguments", "train_transforms"], "loaders"),
        "check_classes": "datasets",
    },
}


@pytest.mark.parametrize(("old", "name", "new"), [(o, n, p) for o, names in MOVED.items() for n, p in names.items()])
def test_a_moved_name_is_the_same_object_and_warns(old, name, new):
    module = importlib.import_module(f"parameternet.training.{old}")
    place, _, new_name = (new if "." in new else f"parameternet.training.{new}").partition(":")
    new_name = new_name or name
    with pytest.warns(DeprecationWarning, match=rf"use {place}\.{new_name}"):
        found = getattr(module, name)
    assert found is getattr(importlib.import_module(place), new_name)


@pytest.mark.parametrize("old", MOVED)
def test_a_name_that_never_was_is_an_attribute_error(old):
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        importlib.import_module(f"parameternet.training.{old}").nonsense  # noqa: B018
