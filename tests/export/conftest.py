"""One small network, exported once for all tests that ask for the same file."""

import importlib
from types import SimpleNamespace

import pytest
import small

from parameternet.export import export


@pytest.fixture(scope="session")
def model():
    return small.network()


@pytest.fixture(scope="session")
def exported(model, tmp_path_factory):
    """exported(format, form, batch, dynamic_size) -> what `export` gives, and `run`, the file as a function."""
    folder, made = tmp_path_factory.mktemp("exported"), {}

    def get(format, form="computed", batch=None, dynamic_size=False):
        key = (format, form, batch, dynamic_size)
        small.needs(format)
        if key not in made:
            writer = importlib.import_module(f"parameternet.export.{format}")
            path = folder / f"{'-'.join(map(str, key))}{writer.SUFFIX}"
            result = export(model, path, format, form=form, batch=batch, dynamic_size=dynamic_size)
            made[key] = SimpleNamespace(result=result, path=path, run=writer.runner(path))
        return made[key]

    return get
