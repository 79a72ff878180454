"""Run timm's own tests/test_models.py, of the installed release, on our networks.

    python benchmarks/timm_tests.py                        every network, every test that lists networks
    python benchmarks/timm_tests.py parameternet_50m       some of them
    python benchmarks/timm_tests.py --offline ...          without the tests that download weights

timm's source distribution carries its tests; pip fetches it once into a cache folder. The tests select networks by
wildcards from all that are registered, so ours are registered and all others hidden, and the selections that name
modules with intermediate features get ours.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "parameternet"

# Becomes a module that pytest loads before timm's tests (as `-p`), so it can say which networks there are.
PLUGIN = """
import os
import timm
import timm.models
import parameternet

chosen = os.environ["PARAMETERNET_TEST_NAMES"].split(",")
everything = timm.list_models

def list_models(filter="", *args, exclude_filters="", **kwargs):
    names = everything(filter, *args, exclude_filters=exclude_filters, **kwargs)
    return [name for name in names if name.split(".")[0] in chosen]

def list_pretrained(*args, **kwargs):
    return [name for name in timm.models.list_pretrained(*args, **kwargs) if name.split(".")[0] in chosen]

timm.list_models = list_models
timm.list_pretrained = list_pretrained
"""

# Appended to timm's list of modules whose networks give intermediate features.
FILTERS = "\nFEAT_INTER_FILTERS += {ours}\n"


def source() -> Path:
    """timm's source distribution of the installed release, unpacked."""
    release = version("timm")
    folder = CACHE / f"timm-{release}"
    if not (folder / "tests" / "test_models.py").exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip"]
        # Its build system is asked for the metadata even for a download.
        subprocess.run([*pip, "install", "--quiet", "pdm-backend"], check=True)
        options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", "--dest", str(CACHE)]
        subprocess.run([*pip, "download", *options, f"timm=={release}"], check=True)
        with tarfile.open(next(CACHE.glob(f"timm-{release}.tar.gz"))) as archive:
            archive.extractall(CACHE, filter="data")
    return folder


def our_names() -> list[str]:
    import timm

    import parameternet  # noqa: F401

    def ours(name: str) -> bool:
        return timm.models.model_entrypoint(name).__module__.startswith("parameternet.")

    return [name for name in timm.list_models() if ours(name)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="networks; all of ours if none is named")
    parser.add_argument("--offline", action="store_true", help="leave out the two tests that load weights")
    parser.add_argument("--quick", action="store_true", help="only forward, backward and features")
    parser.add_argument(
        "--module-filters",
        nargs="*",
        default=["parameternet", "dynamic_timm", "dynamic_yolo"],
        help="added to FEAT_INTER_FILTERS",
    )
    options = parser.parse_args()
    names = options.names or our_names()
    unknown = set(names) - set(our_names())
    if unknown:
        parser.error(f"not ours: {', '.join(sorted(unknown))}; ours are {', '.join(our_names())}")
    folder = source()
    with tempfile.TemporaryDirectory() as scratch:
        tests = Path(scratch) / "test_models.py"
        text = (folder / "tests" / "test_models.py").read_text()
        marker = "\n# transformer / hybrid models"
        assert text.count(marker) == 1, "timm's test_models.py has changed its layout: FEAT_INTER_FILTERS not found"
        tests.write_text(text.replace(marker, FILTERS.format(ours=options.module_filters) + marker))
        (Path(scratch) / "our_networks.py").write_text(PLUGIN)
        # Tests that do not list networks name timm's own; a name of ours in the id tells those that do.
        select = f"({' or '.join(names)})"
        if options.quick:
            select += " and (forward or backward or features)"
        if options.offline:
            select += " and not pretrained"
        path = os.pathsep.join([scratch, str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "pytest", "-q", "-p", "our_networks", "-p", "no:cacheprovider", "-k", select,
                   "-W", "ignore", "-rfE", str(tests)]  # fmt: skip
        return subprocess.run(
            command, cwd=scratch, env={**os.environ, "PYTHONPATH": path, "PARAMETERNET_TEST_NAMES": ",".join(names)}
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
