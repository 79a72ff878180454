"""Predict into a file: every image once, whatever is killed, broken, or changed in between."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import checkpoints
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from parameternet import cli, files, prediction
from parameternet.prediction import Predictor, Result, predict_to_file
from parameternet.prediction.rows import write_errors, write_rows

ROOT = Path(__file__).parent.parent
BROKEN = {"broken.png": b"no image", "empty.jpg": b""}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoints.write(tmp_path_factory.mktemp("weights") / checkpoints.NAME)


@pytest.fixture(scope="module")
def predictor(folder):
    return Predictor(folder, device="cpu")


@pytest.fixture(scope="module")
def network(predictor):
    return predictor.model


def png(seed, size=24):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def images(tmp_path):
    """Seven images and two that cannot be read."""
    for number in range(7):
        path = tmp_path / "images" / f"class {number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
    for name, data in BROKEN.items():
        (tmp_path / "images" / name).write_bytes(data)
    return tmp_path / "images"


def rows_of(path):
    """Path to (indices, labels, probabilities) of a file in any of the formats, and the number of its rows."""
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        split = [[[c[key] for c in row["classes"]] for key in ("index", "label", "probability")] for row in rows]
        return {row["path"]: parts for row, parts in zip(rows, split, strict=True)}, len(rows)
    if path.suffix == ".parquet":
        pq = pytest.importorskip("pyarrow.parquet")
        rows = pq.read_table(path).to_pylist()
        return {row["path"]: [row["indices"], row["labels"], row["probabilities"]] for row in rows}, len(rows)
    with open(path, newline="", encoding="utf-8") as file:
        rows = [*csv.DictReader(file)]
    found = {}
    for row in rows:
        columns = [[row[f"{key}_{k}"] for k in range(1, 4)] for key in ("index", "label", "probability")]
        found[row["path"]] = [[*map(int, columns[0])], columns[1], [*map(float, columns[2])]]
    return found, len(rows)


# Rows ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("workers", [0, 1])
def test_each_format_has_the_predictors_answers(tmp_path, images, predictor, network, suffix, workers):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    output = tmp_path / f"results{suffix}"
    made = predict_to_file(network, [images], output, topk=3, batch_size=2, workers=workers, device="cpu")
    assert (made.images, made.unreadable, made.resumed) == (7, 2, 0)
    rows, number = rows_of(output)
    assert number == 7
    expected = {result.path: result for result in predictor.predict(images, topk=3) if not result.error}
    assert rows.keys() == expected.keys()
    for path, result in expected.items():
        indices, labels, probabilities = rows[path]
        assert (indices, labels) == (result.indices, result.labels)
        assert probabilities == pytest.approx(result.probabilities, abs=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", output.name, f"{output.name}.errors.csv"]


def test_images_that_cannot_be_read_are_in_a_file_of_their_own(tmp_path, images, network, monkeypatch):
    (images / "huge.png").write_bytes(png(0, size=33))
    prepare = prediction.predictor.Preprocess.__call__

    def without_memory(self, image):
        if image.size == (33, 33):  # stands for 1 x 300,000 pixels, which become 64 x 19,200,000
            raise MemoryError
        return prepare(self, image)

    monkeypatch.setattr(prediction.predictor.Preprocess, "__call__", without_memory)
    made = start(network, images, tmp_path / "results.csv")
    with open(made.errors, newline="") as file:
        found = {Path(row["path"]).name: row["error"] for row in csv.DictReader(file)}
    assert found.keys() == BROKEN.keys() | {"huge.png"}
    assert found["empty.jpg"] == "empty file"
    assert found["huge.png"] == "cannot be prepared for the network: MemoryError"


def test_errors_of_a_deleted_output_do_not_stay(tmp_path, images, network):
    predict_to_file(network, [images], tmp_path / "a.csv", workers=0, device="cpu")
    (tmp_path / "a.csv").unlink()
    made = predict_to_file(network, [images / "class 0"], tmp_path / "a.csv", workers=0, device="cpu")
    assert made.errors is None and not (tmp_path / "a.csv.errors.csv").exists()


BREAKS = ["\n", "\r", "\r\n", "\t", "\v", "\f", "\x1c", "\x85", "\u2028", "\u2029"]
BREAKS += [",", ";", '"', '""', "'", "#", "=", " ", "|", "\\"]
NAMES = [f"{odd}{middle}{odd}" for odd in BREAKS for middle in ("", "a")] + ["\udcff"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_every_file_name_comes_back(tmp_path, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    output = tmp_path / f"results{suffix}"
    results = [Result(name, [f"{name}{name}"] * 3, [0.5, 0.3, 0.2], [0, 1, 2]) for name in NAMES]
    write_rows(output, results, topk=3)
    rows, number = rows_of(output)
    assert number == len(NAMES)
    assert rows == {
        plain: [[0, 1, 2], [plain * 2] * 3, pytest.approx([0.5, 0.3, 0.2])]
        for plain in (name.replace("\udcff", "\\udcff") for name in NAMES)
    }


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_labels_with_nul_are_written(tmp_path, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    write_rows(tmp_path / f"a{suffix}", [Result("a.png", ["b\0"] * 3, [0.5, 0.3, 0.2], [0, 1, 2])], topk=3)
    assert rows_of(tmp_path / f"a{suffix}")[0]["a.png"][1] == ["b\\x00"] * 3


def test_names_and_reasons_of_unreadable_images_come_back(tmp_path):
    write_errors(tmp_path / "errors.csv", [Result(name, error=f"x{name}") for name in NAMES])
    with open(tmp_path / "errors.csv", newline="", encoding="utf-8") as file:
        rows = [(row["path"], row["error"]) for row in csv.DictReader(file)]
    plain = [name.replace("\udcff", "\\udcff") for name in NAMES]
    assert rows == [(name, f"x{name}") for name in plain]


def test_files_with_odd_names_are_predicted(tmp_path, network):
    (tmp_path / "images").mkdir()
    for name in (b"\xff.png", b'a,\n"b.png', b"c\rd.png"):
        Path(os.fsdecode(bytes(tmp_path / "images") + b"/" + name)).write_bytes(png(0))
    predict_to_file(network, [tmp_path / "images"], tmp_path / "results.csv", topk=3, workers=0, device="cpu")
    names = sorted(path.rpartition("images/")[2] for path in rows_of(tmp_path / "results.csv")[0])
    assert names == ["\\udcff.png", 'a,\n"b.png', "c\rd.png"]


def test_folders_tars_and_shards_give_the_same_answers(tmp_path, network):
    (tmp_path / "files").mkdir()
    (tmp_path / "shards").mkdir()
    for number in range(6):
        (tmp_path / "files" / f"{number}.png").write_bytes(png(number))
    add(tmp_path / "all.tar", range(6))
    for shard in range(3):
        add(tmp_path / "shards" / f"s-{shard}.tar", range(2 * shard, 2 * shard + 2))
    found = []
    sources = [
        *(f"{tmp_path}/{name}" for name in ("files", "all.tar", "shards")),
        f"wds/{tmp_path}/shards:s-{{0..2}}.tar",
    ]
    for number, given in enumerate(sources):
        predict_to_file(network, [given], tmp_path / f"{number}.csv", topk=3, batch_size=4, workers=0, device="cpu")
        found.append({Path(path).name: row for path, row in rows_of(tmp_path / f"{number}.csv")[0].items()})
    assert len(found[0]) == 6
    for other in found[1:]:
        assert {name: row[0] for name, row in other.items()} == {name: row[0] for name, row in found[0].items()}


def add(path, numbers):
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            data = png(number)
            for name, content in ((f"{number}.png", data), (f"{number}.cls", b"1")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


# Kills ---------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a kill: nothing in the package catches it."""


def killed_at(number):
    def progress(done, total):
        if done >= number:
            raise Killed

    return progress


def start(network, images, output, **changes):
    arguments = {"topk": 3, "batch_size": 2, "workers": 0, "device": "cpu", **changes}
    return predict_to_file(arguments.pop("model", network), [images], output, **arguments)


def test_a_line_that_was_cut_off_is_done_again(tmp_path, images, network):
    output = tmp_path / "results.jsonl"
    with pytest.raises(Killed):
        start(network, images, output, progress=killed_at(6))
    (part,) = (tmp_path / "results.jsonl.parts").glob("*.jsonl")
    part.write_bytes(part.read_bytes()[:-9])  # as a full disk or a lost power leaves it
    made = start(network, images, output)
    assert (made.resumed, made.images, made.unreadable) == (5, 7, 2)
    assert rows_of(output)[1] == len(rows_of(output)[0]) == 7
    assert not (tmp_path / "results.jsonl.parts").exists()


def test_zeros_after_lost_power_are_no_answers(tmp_path, images, network):
    output = tmp_path / "results.csv"
    with pytest.raises(Killed):
        start(network, images, output, progress=killed_at(4))
    (part,) = (tmp_path / "results.csv.parts").glob("*.jsonl")
    part.write_bytes(part.read_bytes() + bytes(100) + b"\n")
    assert start(network, images, output).resumed == 4
    assert rows_of(output)[1] == 7


def test_answers_that_two_processes_gave_count_once(tmp_path, images, network):
    """A process that outlives its run may write next to the new one."""
    output = tmp_path / "results.csv"
    with pytest.raises(Killed):
        start(network, images, output, progress=killed_at(4))
    (part,) = (tmp_path / "results.csv.parts").glob("*.jsonl")
    part.with_name(f"{'0' * 16}.jsonl").write_bytes(part.read_bytes())
    start(network, images, output)
    assert rows_of(output)[1] == len(rows_of(output)[0]) == 7


def test_run_killed_after_the_rename_writes_the_file_again(tmp_path, images, network, monkeypatch):
    output = tmp_path / "results.csv"
    monkeypatch.setattr(prediction.parts.Parts, "remove", lambda self: killed_at(0)(0, 0))
    with pytest.raises(Killed):
        start(network, images, output)
    monkeypatch.undo()
    assert output.exists()
    assert start(network, images, output).resumed == 9
    assert rows_of(output)[1] == 7


@pytest.mark.parametrize("removed", range(3))
def test_parts_of_a_run_killed_while_removing_them_are_not_read(tmp_path, images, network, monkeypatch, removed):
    """Killed after `removed` files; by then the output is complete, and the user deletes it to use another network."""
    output, unlink, done = tmp_path / "results.csv", Path.unlink, []

    def unlink_some(self, missing_ok=False):
        if self.parent.name == "results.csv.parts":
            killed_at(removed)(len(done), 0)
            done.append(self)
        unlink(self, missing_ok)

    with pytest.raises(Killed):
        start(network, images, output, progress=killed_at(4))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "unlink", unlink_some)
        start(network, images, output)
    output.unlink()
    other = checkpoints.write(tmp_path / "other" / checkpoints.NAME, checkpoints.network(seed=1))
    if not removed:
        with pytest.raises(ValueError, match="holds a run started with another digest of the weights"):
            start(other, images, output)
        return
    assert start(other, images, output).resumed == 0
    start(other, images, tmp_path / "new.csv")
    assert output.read_bytes() == (tmp_path / "new.csv").read_bytes()
    assert not (tmp_path / "results.csv.parts").exists()


def test_parts_without_a_setup_are_not_read(tmp_path, images, network):
    output, parts = tmp_path / "results.csv", tmp_path / "results.csv.parts"
    with pytest.raises(Killed):
        start(network, images, output, progress=killed_at(4))
    (parts / "setup.json").unlink()
    assert start(network, images, output).resumed == 0


def test_other_files_in_a_folder_of_that_name_stay_and_are_not_read(tmp_path, images, network):
    (tmp_path / "results.csv.parts").mkdir()
    mine = {"mine.jsonl": "[0, [1, 2, 3], [0.5, 0.3, 0.2], null]\n", "notes.txt": "to keep"}
    for name, text in mine.items():
        (tmp_path / "results.csv.parts" / name).write_text(text)
    assert start(network, images, tmp_path / "results.csv").resumed == 0
    assert {path.name: path.read_text() for path in (tmp_path / "results.csv.parts").iterdir()} == mine


CHANGES = {
    "topk": ({"topk": 2}, "another topk: 3, now 2"),
    "weights": ({"model": "other"}, "another digest of the weights"),
    "added": ({}, "another number of images: 9, now 10"),
    "resized": ({}, "another digest of the images' names and sizes"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_setup_is_refused(tmp_path, images, network, change):
    output = tmp_path / "results.csv"
    with pytest.raises(Killed):
        start(network, images, output, progress=killed_at(4))
    before = {path: path.read_bytes() for path in (tmp_path / "results.csv.parts").iterdir()}
    changes, why = CHANGES[change]
    if change == "weights":
        changes = {"model": checkpoints.write(tmp_path / "other" / checkpoints.NAME, checkpoints.network(seed=1))}
    if change == "added":
        (images / "more.png").write_bytes(png(50))
    if change == "resized":
        (images / "class 0" / "0.png").write_bytes(png(50, size=25))
    with pytest.raises(ValueError, match=f"holds a run started with {why}.*delete the folder to start over"):
        start(network, images, output, **changes)
    assert {path: path.read_bytes() for path in (tmp_path / "results.csv.parts").iterdir()} == before


def test_other_batches_workers_and_formats_of_names_resume(tmp_path, images, network):
    output = tmp_path / "results.csv"
    with pytest.raises(Killed):
        start(network, images, output, progress=killed_at(4))
    made = start(network, images, output, batch_size=3, workers=1)
    assert (made.resumed, made.images) == (4, 7)


def test_a_finished_output_and_a_running_one_are_refused(tmp_path, images, network, monkeypatch):
    monkeypatch.setattr(prediction.parts.Parts, "patience", 0.0)
    output = tmp_path / "results.csv"
    start(network, images, output)
    written = output.read_bytes()
    with pytest.raises(ValueError, match=r"results\.csv exists; delete it, or give another --output"):
        start(network, images, output)
    assert output.read_bytes() == written
    with (
        files.lock(tmp_path / ".other.csv.lock", "it"),
        pytest.raises(files.Locked, match=f"other.csv is in use by this process .{os.getpid()}."),
    ):
        start(network, images, tmp_path / "other.csv")


@pytest.mark.parametrize(
    "name, why",
    [
        ("results.txt", "unsupported format results.txt; use .csv, .jsonl, .parquet"),
        ("results", "unsupported format results"),
        ("none/results.csv", "the folder .*none does not exist"),
        ("folder.csv", "is a folder; give the name of a file"),
    ],
)
def test_unwritable_output_is_rejected_before_loading_the_model(tmp_path, name, why):
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ValueError, match=why):
        predict_to_file("no such model", [tmp_path], tmp_path / name)


# Processes -----------------------------------------------------------------------------------------------------------


def torchrun(folder, source, output, processes=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "parameternet", "predict", str(source), "--model", str(folder), "--output", str(output)]
    command += ["--batch-size", "4", "--workers", "1", "--device", "cpu"]
    search = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    variables = {"PYTHONPATH": search, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(
        command, env={**os.environ, **variables}, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def answered(output):
    return [len(path.read_bytes().splitlines()) for path in Path(f"{output}.parts").glob("*.jsonl")]


def kill_at(run, output, number, whole_group):
    """Kill a run once two processes have answered and there are `number` answers in all."""
    deadline = time.monotonic() + 200
    while not (sum(answered(output)) >= number and sum(map(bool, answered(output))) >= 2):
        assert run.poll() is None, run.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGKILL) if whole_group else run.kill()
    run.wait()
    run.stderr.close()


def test_two_processes_killed_twice_answer_every_image_once(tmp_path, folder):
    total = 3000
    add(tmp_path / "all.tar", range(total))
    output = tmp_path / "results.csv"
    kill_at(torchrun(folder, tmp_path / "all.tar", output), output, 200, whole_group=True)
    first = sum(answered(output))
    kill_at(torchrun(folder, tmp_path / "all.tar", output), output, first + 200, whole_group=False)  # torchrun alone
    assert not output.exists()
    run = torchrun(folder, tmp_path / "all.tar", output, processes=1)
    _, words = run.communicate(timeout=250)
    assert run.returncode == 0, words
    assert f"{total:,} images, " in words and "from an earlier start" in words
    rows, number = every_path(output)
    assert number == total
    assert rows == {f"{tmp_path}/all.tar/{i}.png" for i in range(total)}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.tar", "results.csv"]


def every_path(output):
    with open(output, newline="") as file:
        paths = [row["path"] for row in csv.DictReader(file)]
    return set(paths), len(paths)


# The command ---------------------------------------------------------------------------------------------------------


def run(*arguments, code=0):
    done = CliRunner().invoke(cli.main, ["predict", *map(str, arguments), "--device", "cpu"])
    assert done.exit_code == code, f"{done.output}\n{done.exception!r}"
    return done


def test_command_reports_on_stderr_without_a_bar_in_a_pipe(tmp_path, images, folder):
    output = tmp_path / "results.csv"
    done = run(images, "--model", folder, "--output", output, "--workers", 0)
    assert done.stdout == ""
    assert done.stderr == (f"{output}: 7 images\n{output}.errors.csv: 2 images that cannot be read\n")


def test_the_command_as_json(tmp_path, images, folder):
    output = tmp_path / "results.csv"
    done = run(images, "--model", folder, "--output", output, "--workers", 0, "--json")
    found = json.loads(done.stdout)
    assert (found["output"], found["images"], found["unreadable"]) == (str(output), 7, 2)


def test_parquet_without_pyarrow_is_a_sentence(tmp_path, images, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    done = run(images, "--model", folder, "--output", tmp_path / "results.parquet", code=1)
    assert done.stderr.endswith("needs the package pyarrow: pip install 'parameternet[parquet]'\n")


def test_save_and_output_do_not_go_together(tmp_path, images):
    done = run(images, "--output", tmp_path / "a.csv", "--save", tmp_path / "a.png", code=2)
    assert "--save draws what is printed; it does not go with --output" in done.stderr


def test_a_bar_shows_speed_and_time_left_on_a_terminal(folder, images, tmp_path):
    pty = pytest.importorskip("pty")
    leader, follower = pty.openpty()
    code = (
        "import sys, time\nfrom parameternet.cli.progress import Bar\n"
        "with Bar('predict') as bar:\n for done in range(1, 6):\n  bar(done * 10, 100)\n  time.sleep(0.3)"
    )
    variables = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], stderr=follower, env=variables, check=True, timeout=60)
    os.close(follower)
    shown = os.read(leader, 1 << 16).decode()
    assert "50/100" in shown and "images/s" in shown and "0:00:0" in shown
