"""What timm reads beyond folders and tars. The packages that it needs are not among ours: skipped where missing."""

import io
import tarfile

import pytest

from parameternet.training import run, validate

CLASSES = ("blue", "green", "red")


def test_webdataset_shards_are_trained_on_and_measured(tmp_path, pictures, recipe):
    pytest.importorskip("webdataset")
    files = sorted((pictures / "val").rglob("*.png"))
    for shard in range(3):
        with tarfile.open(tmp_path / f"v-{shard}.tar", "w") as tar:
            for i, path in enumerate(files[shard::3]):
                for end, content in (
                    ("png", path.read_bytes()),
                    ("cls", str(CLASSES.index(path.parent.name)).encode()),
                ):
                    member = tarfile.TarInfo(f"{i}.{end}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    spec = f"wds/{tmp_path}:v-{{0..2}}.tar|15"
    result = run(recipe(train=spec, val=spec, num_classes=3, workers=1, epochs=1), tmp_path / "run")
    assert result["last"]["images"] == 15
    streamed, read = validate(tmp_path / "run", spec, workers=1), validate(tmp_path / "run", str(pictures / "val"))
    assert (streamed["images"], streamed["top1"]) == (15, pytest.approx(read["top1"]))


def test_hugging_face_data_sets_are_trained_on(tmp_path, pictures, recipe, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    result = run(
        recipe(train=f"hfds/{pictures / 'train'}:train", val=f"hfds/{pictures / 'val'}:train", epochs=1), tmp_path
    )
    assert result["last"]["images"] == 15
