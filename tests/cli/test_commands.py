"""The command line as a person meets it."""

import configparser
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import checkpoints
import huggingface_hub
import pytest
from click.testing import CliRunner
from PIL import Image

from parameternet import cli, diagnosis, weights
from parameternet.cli import output, progress

ROOT = Path(__file__).parent.parent.parent
PHOTOS = ROOT / "tests" / "photos"
RECORDED = ("--model", checkpoints.NAME)
CAT = str(PHOTOS / "cat.jpg")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("weights") / checkpoints.NAME, results={"top1": 41.25})


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """Commands reach nothing beyond this machine, and no cache of the user's."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in diagnosis.VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def recorded(folder, monkeypatch):
    checkpoints.record(monkeypatch, folder)
    return folder


def run(*arguments, code=0):
    done = CliRunner().invoke(cli.main, list(map(str, arguments)))
    assert done.exit_code == code, f"{done.output}\n{done.exception!r}"
    return done


# The group -----------------------------------------------------------------------------------------------------------


def test_help_names_every_command_and_imports_none():
    code = "import sys, parameternet.cli as c; c.main(['--help'], standalone_mode=False); "
    code += "print([m for m in sys.modules if m.startswith(('parameternet.cli.', 'rich', 'matplotlib'))])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          cwd=Path(__file__).parent.parent.parent)  # fmt: skip
    *words, imported = done.stdout.splitlines()
    assert imported == "[]", done.stderr
    for name in cli.COMMANDS:
        assert any(line.startswith(f"  {name} ") for line in words), name


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_explains_itself(name):
    assert run(name, "--help").stdout.startswith(f"Usage: main {name} ")


def test_version():
    assert re.fullmatch(r"parameternet, version \d+\.\d+\.\d+\n", run("--version").stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lst"], "no such command 'lst'; closest: list"),
        (["xyzzy"], "there are: list, info, predict"),
        (["list", "--jsn"], "--json"),
        (["info", "parameternet_60m"], "closest: parameternet_600m"),
        (["info", "zzz"], "no network 'zzz'. `parameternet list` shows all names"),
        (["list", "parametenet_300m"], "closest: parameternet_300m"),
        (["predict"], "Missing argument 'IMAGE...'"),
        (["predict", CAT, "--model", "parameternet_50m.tin20"], "closest: parameternet_50m.tin200"),
        (["predict", CAT, "--topk", "0"], "0 is not in the range x>=1"),
        (["val", "NAME", "--data", "DATA", "--batch-size", "0"], "0 is not in the range x>=1"),
        (["val", "NAME", "--data", "DATA", "--workers", "-1"], "-1 is not in the range x>=0"),
        (["release", "RUN", "NAME", "--data", "DATA", "--batch-size", "-3"], "-3 is not in the range x>=1"),
        (["predict", CAT, "--save", "a.foo"], "unsupported image format"),
        (["predict", CAT, "--save", "none/a.png"], "the folder none does not exist"),
    ],
)
def test_usage_errors_name_what_is_nearest(recorded, arguments, message):
    done = run(*arguments, code=2)
    assert message in done.stderr
    assert not done.stdout


def test_errors_are_a_sentence_and_tracebacks_are_for_debugging(recorded, monkeypatch, tmp_path):
    done = run("predict", CAT, "--model", tmp_path, code=1)
    assert done.stderr.startswith(f"Error: there is no {tmp_path}/config.json")
    assert isinstance(CliRunner().invoke(cli.main, ["--debug", "predict", CAT, "--model", str(tmp_path)]).exception,
                      weights.WeightsNotFound)  # fmt: skip
    monkeypatch.setattr("parameternet.prediction.Predictor.__init__", lambda *_: 1 / 0)
    defect = CliRunner().invoke(cli.main, ["predict", CAT])
    assert isinstance(defect.exception, ZeroDivisionError), "a defect of ours must not look like the user's error"


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("yaml", "`parameternet train` needs the package yaml: pip install 'parameternet[train]'"),
        ("numpy.linalg", "`parameternet train` needs the package numpy: pip install numpy"),
        ("parameternet.training", "`parameternet train` is not part of this installation (parameternet.training is "),
    ],
)
def test_a_missing_package_gives_the_line_that_installs_it(monkeypatch, missing, message):
    def lacking(_):
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(cli.importlib, "import_module", lacking)
    assert run("train", "a.yaml", code=1).stderr.startswith(f"Error: {message}")


# list and info --------------------------------------------------------------------------------------------------------


def test_list_shows_networks_and_checkpoints(recorded):
    lines = run("list", "parameternet").stdout.splitlines()
    headers = [line for line in lines if line.startswith("name ")]
    assert {tuple(line.split()) for line in headers} == {
        ("name", "tag", "parameters", "MACs", "input", "top-1", "weights")
    }
    cells = {line.split()[0]: line.split() for line in lines if line.startswith("parameternet_")}
    assert set(cells) == {"parameternet_50m", "parameternet_150m", "parameternet_300m", "parameternet_600m"}
    assert cells["parameternet_50m"][1] == "tin200" and "41.25" in cells["parameternet_50m"]
    assert cells["parameternet_50m"][-1].endswith("parameternet_50m.tin200/model.safetensors")
    assert cells["parameternet_150m"][1:4] == ["-", "8.61", "M"] and cells["parameternet_150m"][-1] == "-"


def test_list_as_json(recorded):
    rows = {row["name"]: row for row in json.loads(run("list", "--json", "parameternet_?[05]0m").stdout)}
    assert set(rows) == {"parameternet_150m", "parameternet_300m", "parameternet_600m"}
    assert rows["parameternet_600m"]["parameters"] == 34_504_504 - 800 * 1281  # its checkpoint knows 200 classes
    assert rows["parameternet_150m"]["parameters"] == 8_607_992
    assert 140e6 < rows["parameternet_150m"]["macs"] < 150e6
    assert rows["parameternet_150m"]["top1"] is None


def test_list_says_when_weights_are_on_the_hub(recorded, monkeypatch, tmp_path):
    monkeypatch.setenv("PARAMETERNET_WEIGHTS", str(tmp_path))
    row = json.loads(run("list", "--json", "50m.tin200").stdout)[0]
    assert row["weights"] == f"Hub: parameternet/{checkpoints.NAME}"


def test_list_shows_upcycled_checkpoints_with_their_figures():
    rows = {row["name"]: row for row in json.loads(run("list", "--json", "dynamic_ghostnet_*").stdout)}
    assert rows["dynamic_ghostnet_100"]["tag"] == "in1k_upcycled" and rows["dynamic_ghostnet_100"]["top1"] == 73.958
    assert rows["dynamic_ghostnet_100"]["weights"] == "Hub: timm/ghostnet_100.in1k"
    assert rows["dynamic_ghostnet_050"]["tag"] is rows["dynamic_ghostnet_050"]["weights"] is None


def test_info_adds_up(recorded):
    facts = json.loads(run("info", checkpoints.NAME, "--json").stdout)
    model = checkpoints.network()
    split = facts["parameters"]
    assert split["total"] == sum(parameter.numel() for parameter in model.parameters())
    assert split["total"] == sum(number for kind, number in split.items() if kind != "total")
    dynamic = [module for module in model.modules() if type(module).__name__ == "DynamicConv"]
    assert split["expert kernels"] == sum(module.weight.numel() for module in dynamic)
    assert split["routers"] == sum(p.numel() for module in dynamic for p in module.routing.parameters())
    macs = facts["macs"]
    assert macs["total"] == sum(number for kind, number in macs.items() if kind != "total")
    assert facts["not_counted"]["batch_norm"] > 0
    assert facts["input_size"] == [3, 64, 64] and facts["num_classes"] == 5 and facts["top1"] == 41.25
    assert facts["experts"]["num_experts"] == [4] and facts["experts"]["dynamic_convolutions"] == len(dynamic)
    assert [stage["height"] for stage in facts["stages"]] == [32, 16, 8, 4, 2]
    assert [stage["channels"] for stage in facts["stages"]] == [tap["num_chs"] for tap in model.feature_info]


def test_info_in_words():
    words = run("info", "parameternet_150m").stdout
    for part in ("8.61 M  100.0%", "convolutions of 4 experts, softmax routing", "3 x 224 x 224", "112 x 112"):
        assert part in words, words
    last = words.splitlines()[-1]
    assert last.startswith("not counted: ") and "batch_norm x 80, sum x 76, layer_norm x 76, " in last


# predict -------------------------------------------------------------------------------------------------------------


def test_predict_names_classes(recorded):
    done = run("predict", *RECORDED, CAT, "--topk", "2")
    path, *classes = done.stdout.splitlines()
    assert path == CAT and len(classes) == 2
    assert all(re.fullmatch(r"  +\d+\.\d%  (tabby|espresso|rocket|teapot|very long .*)", line) for line in classes)
    assert "\x1b" not in done.stdout


def test_predict_goes_on_after_what_it_cannot_read(recorded, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    done = run(
        "predict", *RECORDED, tmp_path / "text.jpg", CAT, "http://127.0.0.1:9/a.jpg", tmp_path / "none.png", code=1
    )
    assert done.stdout.splitlines()[0] == CAT
    assert [line.partition(": ")[2][:12] for line in done.stderr.splitlines()] == [
        "not an image",
        "no answer fr",
        "no such file",
    ]


def test_predict_as_json_is_nothing_but_json(recorded, tmp_path):
    done = run("predict", *RECORDED, PHOTOS, tmp_path / "none.png", "--json", "--save", tmp_path / "a.png", code=1)
    answer = json.loads(done.stdout)
    assert answer["model"] == checkpoints.NAME
    assert [result["error"] for result in answer["results"]] == [None, None, None, "no such file"]
    assert answer["results"][0]["classes"][0].keys() == {"index", "label", "probability"}


@pytest.mark.parametrize("suffix", [".png", ".JPG", ".webp"])
def test_predict_saves_a_picture(recorded, tmp_path, suffix):
    run("predict", *RECORDED, PHOTOS, "--save", tmp_path / f"a{suffix}")
    assert [path.name for path in tmp_path.iterdir()] == [f"a{suffix}"]
    with Image.open(tmp_path / f"a{suffix}") as picture:
        picture.load()
        assert picture.width > 1000


@pytest.mark.filterwarnings("default")
def test_a_file_without_digest_is_a_plain_warning(tmp_path):
    from safetensors.torch import save_file

    checkpoints.write(tmp_path)
    save_file(checkpoints.network().state_dict(), tmp_path / weights.FILE_NAME)
    done = run("predict", CAT, "--model", tmp_path)
    assert done.stderr.startswith("Warning: ") and "has no digest" in done.stderr
    assert "UserWarning" not in done.stderr


# doctor --------------------------------------------------------------------------------------------------------------


def test_doctor_finds_all_well(recorded):
    report = json.loads(run("doctor", "--json").stdout)
    assert report["problems"] == []
    assert [(found["name"], found["state"]) for found in report["checkpoints"]] == [(checkpoints.NAME, "verified")]
    assert report["versions"]["timm"] and report["devices"][0]["device"] == "cpu"
    assert run("doctor").stdout.endswith("All is well.\n")


def test_doctor_reports_problems_and_fixes(monkeypatch, tmp_path):
    own = checkpoints.write(tmp_path / checkpoints.NAME)
    checkpoints.record(monkeypatch, own)
    path = own / weights.FILE_NAME
    path.write_bytes(path.read_bytes()[:-100])
    done = run("doctor", code=1)
    assert re.search(rf"{checkpoints.NAME} +broken", done.stdout)
    assert "expected SHA-256" in done.stdout and "Remove it and get it again" in done.stdout
    path.unlink()
    assert json.loads(run("doctor", "--json").stdout)["checkpoints"][0]["state"] == "not here"


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda m: m.setenv("PARAMETERNET_WEIGHTS", "/no/such/folder"), "which is not a folder"),
        (lambda m: m.setitem(diagnosis.NEEDED, "timm", "99.1"), "older than 99.1"),
        (lambda m: m.setitem(diagnosis.NEEDED, "no-such-package", ""), "pip install no-such-package"),
        (lambda m: m.setattr(weights, "known", lambda: {"x_50m.a": {"sha256": "0", "bytes": 1}}), "no network of that"),
    ],
)
def test_doctor_sees(recorded, monkeypatch, break_it, message):
    break_it(monkeypatch)
    assert message in run("doctor", code=1).stdout


def test_list_puts_accuracy_first_and_demonstrations_last(monkeypatch):
    module = importlib.import_module("parameternet.cli.list")
    found = {"a": ("tin200", 40.0), "b": (None, None), "c": ("in1k_upcycled", 70.0), "d": ("in1k", 75.0)}
    row = {"parameters": 1, "macs": 1, "input_size": (3, 8, 8), "weights": None}
    monkeypatch.setattr(module, "find_names", lambda pattern: list(found))
    monkeypatch.setattr(module, "summarise", lambda n: {**row, "name": n, "tag": found[n][0], "top1": found[n][1]})
    text = run("list").stdout
    titles = [module.IMAGENET, module.UNTRAINED, module.DEMOS]
    assert [line for line in text.splitlines() if line in titles] == titles
    assert [line[0] for line in text.splitlines() if line[1:2] == " "] == ["d", "c", "b", "a"]


def test_doctor_knows_the_versions_and_extras_of_setup_cfg():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    needed = dict(
        re.match(r"([\w-]+)(?:>=([\d.]+))?$", line).groups()
        for line in config["options"]["install_requires"].split("\n")
        if line
    )
    assert {name: version or "" for name, version in needed.items()}.items() <= diagnosis.NEEDED.items()
    assert diagnosis.EXTRAS.keys() <= config["options.extras_require"].keys()


def test_completion_knows_the_commands():
    asked = {"_PARAMETERNET_COMPLETE": "bash_complete", "COMP_WORDS": "parameternet pr", "COMP_CWORD": "1"}
    code = "from parameternet.cli import main; main(prog_name='parameternet')"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True)
    assert done.stdout.split() == ["plain,predict"]


def test_progress_is_shown_on_a_terminal_only(monkeypatch, capsys):
    with progress.Bar("some") as bar, progress.working("thinking"):
        bar(1, 2)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    with progress.working("thinking"):
        pass
    with progress.Bar("some") as bar:
        bar(1, 2)
    assert "1/2" in capsys.readouterr().err


# Output --------------------------------------------------------------------------------------------------------------


def test_piped_tables_are_never_cut_off():
    long = "x" * 300
    assert output.plain_table(("a", "number"), [(long, "1"), ("b", "22")], right=("number",)) == [
        "a" + " " * 299 + "  number",
        long + "       1",
        "b" + " " * 299 + "      22",
    ]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (None, "-"),
        (0, "0"),
        (999, "999"),
        (1000, "1 k"),
        (2_463_856, "2.46 M"),
        (34_504_504, "34.5 M"),
        (2.5e9, "2.5 G"),
    ],
)
def test_counts_in_words(number, words):
    assert output.count(number) == words
