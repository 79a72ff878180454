"""What is published is what is pulled; nothing goes twice, and nothing goes in halves."""

import json
import os
import subprocess
import sys
import traceback

import checkpoints
import huggingface_hub
import pytest
import timm
import torch
from click.testing import CliRunner
from server import TOKEN, connect

from parameternet import cli, weights
from parameternet import hub as room

NAME = checkpoints.NAME
TO = "somebody/net"
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
WRONG_TOKEN = "hf_" + "Expired7" * 4
RESULTS = {"top1": 41.5, "top5": 70.25, "data": "Five Things", "images": 1234, "parameters": 99, "macs": 5_000_000}


@pytest.fixture
def folder(tmp_path):
    folder = checkpoints.write(tmp_path / "made" / NAME, results=RESULTS)
    (folder / "history.csv").write_text("epoch\n")
    return folder


@pytest.fixture
def signed_in(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def run(*arguments, code=0, **kwargs):
    done = CliRunner().invoke(cli.main, ["publish", *map(str, arguments)], **kwargs)
    assert done.exit_code == code, f"{done.output}\n{done.exception!r}"
    return done.output


def states(published):
    return {file.path: file.state for file in published.files}


def commits(hub, repo_id=TO):
    return hub.repositories[repo_id].branches["main"]


def logits(model):
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(x)


# The whole way -------------------------------------------------------------------------------------------------------


def test_what_is_published_is_what_is_pulled(signed_in, folder):
    done = room.publish(folder, TO)
    assert states(done) == dict.fromkeys((CARD, CONFIG, WEIGHTS, "history.csv"), "new")
    assert done.commit == f"{signed_in.address}/{TO}/commit/{commits(signed_in)[0]}" and len(commits(signed_in)) == 1
    assert signed_in.files(TO)[WEIGHTS] == (folder / WEIGHTS).read_bytes()
    assert not signed_in.repositories[TO].private
    pulled = timm.create_model(f"hf-hub:{TO}", pretrained=True)
    assert torch.equal(logits(pulled), logits(checkpoints.network()))
    assert f'create_model("hf-hub:{TO}", pretrained=True)' in signed_in.files(TO)[CARD].decode()


@pytest.mark.parametrize(
    ("kind", "part"), [("cut", WEIGHTS), ("slow", WEIGHTS), ("flipped", WEIGHTS), ("short", CONFIG), ("500", WEIGHTS)]
)
def test_faulty_download_gives_the_same_logits_or_an_error(signed_in, folder, kind, part):
    room.publish(folder, TO)
    signed_in.fail(kind, "GET", part)
    try:
        config = weights.config(f"hf-hub:{TO}")
        pulled = timm.create_model(f"hf-hub:{TO}", pretrained=True)
    except weights.WeightsNotFound as error:
        assert kind in ("short", "500") and str(error).startswith(signed_in.address)
        pulled, config = timm.create_model(f"hf-hub:{TO}", pretrained=True), weights.config(f"hf-hub:{TO}")
    assert torch.equal(logits(pulled), logits(checkpoints.network())) and config["results"] == RESULTS


def test_in_fresh_processes_by_the_commands_and_then_offline(hub, folder, tmp_path):
    code = f"""if True:
        import timm, torch, parameternet
        model = timm.create_model("hf-hub:{TO}", pretrained=True).eval()
        x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        print("logits", *model(x).flatten().tolist())"""
    publish = ["-m", "parameternet", "publish", str(folder), "--to", TO]
    token = {"HF_TOKEN": TOKEN}
    words = fresh(hub, tmp_path, publish, **token)
    assert f"{hub.address}/{TO}/commit/{commits(hub)[0]}" in words and TOKEN not in words
    expected = logits(checkpoints.network()).flatten()
    for setting in ({}, {"HF_HUB_OFFLINE": "1"}):
        words = fresh(hub, tmp_path, ["-c", code], **setting)
        found = words.partition("logits ")[2].splitlines()[0]
        apart = torch.tensor([float(word) for word in found.split()]) - expected
        assert apart.abs().max() <= 1e-5 * expected.abs().max()


def fresh(hub, tmp_path, arguments, **settings):
    """What a process of its own, which has `hub` for the Hub, prints on both streams."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PARAMETERNET_"))}
    environment = clean | hub.environment(tmp_path / "fresh") | settings
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


# One commit or none --------------------------------------------------------------------------------------------------


def test_the_same_files_make_no_second_commit(signed_in, folder):
    room.publish(folder, TO)
    again = room.publish(folder, TO)
    assert again.commit is None and set(states(again).values()) == {"same"} and len(commits(signed_in)) == 1
    assert "Nothing to commit" in run(folder, "--to", TO)
    (folder / "history.csv").write_text("epoch\n1\n")
    uploads = len(signed_in.asked("PUT"))
    third = room.publish(folder, TO)
    assert states(third)["history.csv"] == "changed" and len(commits(signed_in)) == 2
    assert len(signed_in.asked("PUT")) == uploads, "the weights went again"


def test_a_dry_run_sends_nothing(hub, folder):
    words = run(folder, "--to", TO, "--dry-run")
    size = f"{(folder / WEIGHTS).stat().st_size:,}"
    assert [line.split() for line in words.splitlines() if WEIGHTS in line] == [[WEIGHTS, size, "new"]]
    assert not hub.repositories and {method for method, _, _ in hub.requests} <= {"GET", "HEAD"}
    hub.put(TO, {**{path.name: path.read_bytes() for path in folder.iterdir()}, WEIGHTS: b"other"})
    before, asked = commits(hub).copy(), len(hub.requests)
    assert states(room.publish(folder, TO, dry_run=True)) == {
        CARD: "new", CONFIG: "same", WEIGHTS: "changed", "history.csv": "same",
    }  # fmt: skip
    assert commits(hub) == before
    assert not [path for method, path, _ in hub.requests[asked:] if method != "GET" and "paths-info" not in path]


def test_other_weights_are_replaced_only_if_asked_to(signed_in, folder):
    signed_in.put(TO, {WEIGHTS: b"other"})
    with pytest.raises(room.OtherWeights, match=r"holds other weights\. To replace them: overwrite=True, or --yes"):
        room.publish(folder, TO)
    assert "Replace them? [y/N]: n\nAborted!" in run(folder, "--to", TO, input="n\n", code=1)
    assert signed_in.files(TO) == {WEIGHTS: b"other"}
    assert "/commit/" in run(folder, "--to", TO, input="y\n")
    assert signed_in.files(TO)[WEIGHTS] == (folder / WEIGHTS).read_bytes()
    signed_in.put(TO, {WEIGHTS: b"other"})
    assert "Replace them?" not in run(folder, "--to", TO, "--yes")
    assert signed_in.files(TO)[WEIGHTS] == (folder / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("kind", "method", "part"),
    [
        ("403", "PUT", "/storage/"),
        ("500", "POST", "/commit/"),
        ("cut", "POST", "/commit/"),
        ("412", "POST", "/commit/"),
        ("403", "POST", "/lfs/objects/batch"),
        ("400", "POST", "/preupload/"),
    ],
)
def test_an_upload_that_breaks_off_leaves_what_was_there(signed_in, folder, kind, method, part):
    signed_in.put(TO, {WEIGHTS: b"other", CARD: b"---\nlicense: mit\n---\n"})
    before = signed_in.files(TO).copy()
    signed_in.fail(kind, method, part)
    with pytest.raises(room.PublishError) as caught:
        room.publish(folder, TO, overwrite=True)
    assert "\n" not in str(caught.value) and TOKEN not in "".join(traceback.format_exception(caught.value))
    assert signed_in.files(TO) == before
    assert room.publish(folder, TO, overwrite=True).commit and signed_in.files(TO)[CONFIG]


def test_a_passing_fault_of_the_storage_is_survived(signed_in, folder):
    signed_in.fail("500", "PUT", "/storage/")
    assert room.publish(folder, TO).commit and len(signed_in.asked("PUT")) == 2


def test_a_commit_whose_answer_is_lost_is_not_made_twice(signed_in, folder):
    signed_in.fail("lost", "POST", "/commit/")
    with pytest.raises(room.PublishError, match="the Hub did not respond"):
        room.publish(folder, TO)
    assert room.publish(folder, TO).commit is None and len(commits(signed_in)) == 1


def test_concurrent_commit_is_not_overwritten(signed_in, folder):
    signed_in.put(TO, {"notes.txt": b"hello"})
    signed_in.fail(lambda: signed_in.put(TO, {WEIGHTS: b"other"}) and None, "POST", "/preupload/")
    with pytest.raises(room.PublishError, match=r"the Hub returned an error .*412"):
        room.publish(folder, TO)
    assert signed_in.files(TO) == {"notes.txt": b"hello", WEIGHTS: b"other"}


# What goes -----------------------------------------------------------------------------------------------------------


def test_damaged_weights_stay_here(signed_in, folder):
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(weights.WeightsDamaged, match="not those that were saved"):
        room.publish(folder, TO)
    (folder / WEIGHTS).unlink()
    with pytest.raises(weights.WeightsNotFound, match=r"holds no model\.safetensors"):
        room.publish(folder, TO)
    assert not signed_in.repositories


def test_a_name_of_ours_goes_only_with_the_recorded_weights(signed_in, folder, monkeypatch):
    checkpoints.record(monkeypatch, folder)
    assert room.publish(NAME, TO).commit
    weights.save(checkpoints.network(seed=1).state_dict(), folder / WEIGHTS)
    config = checkpoints.config()
    config["pretrained_cfg"]["tag"] = "tin200"
    (folder / CONFIG).write_text(json.dumps(config))
    for source, to in ((NAME, "somebody/other"), (folder, f"parameternet/{NAME}")):
        with pytest.raises(weights.WeightsDamaged, match="is not the recorded file"):
            room.publish(source, to)
    assert list(signed_in.repositories) == [TO]


def test_a_checkpoint_that_is_read_from_elsewhere_is_not_published(signed_in):
    with pytest.raises(room.PublishError, match=r"has no weights of its own.*`parameternet upcycle` makes a folder"):
        room.publish("dynamic_ghostnet_100.in1k_upcycled", TO)


def test_a_card_by_hand_goes_as_it_is(signed_in, folder):
    (folder / CARD).write_text("---\nlicense: mit\n---\n# Mine\n")
    room.publish(folder, TO)
    assert signed_in.files(TO)[CARD] == b"---\nlicense: mit\n---\n# Mine\n"


def test_a_card_that_the_hub_refuses_is_a_sentence(signed_in, folder):
    (folder / CARD).write_text("---\ntags: one\n---\n# Mine\n")
    with pytest.raises(room.PublishError, match=r"somebody/net: Invalid metadata in README.md. - tags must be a list"):
        room.publish(folder, TO)
    assert not commits(signed_in)


def test_a_branch_and_a_private_repository_are_made(signed_in, folder):
    signed_in.put(TO, {"notes.txt": b"hello"})
    room.publish(folder, TO, revision="next")
    assert set(signed_in.files(TO)) == {"notes.txt"} and WEIGHTS in signed_in.files(TO, "next")
    assert torch.equal(logits(timm.create_model(f"hf-hub:{TO}@next", pretrained=True)), logits(checkpoints.network()))
    run(folder, "--to", "somebody/secret", "--private")
    assert signed_in.repositories["somebody/secret"].private and not signed_in.repositories[TO].private


# Who may -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "somebody/net: the Hub requires a login for this: hf auth login"),
        (WRONG_TOKEN, "somebody/net: the Hub rejects the current token, which is wrong or has expired"),
        ("hf_Secret\x00Secret", "somebody/net: the Hub did not respond"),
    ],
)
def test_bad_token_uploads_nothing_and_is_not_shown(hub, folder, token, message):
    with pytest.raises(room.PublishError, match=message) as caught:
        room.publish(folder, TO, token=token)
    shown = "".join(traceback.format_exception(caught.value))
    assert "\n" not in str(caught.value) and "Secret" not in shown and WRONG_TOKEN not in shown
    assert not hub.repositories


def test_the_commands_show_no_token(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", WRONG_TOKEN)
    words = run(folder, "--to", TO, code=1)
    assert "rejects the current token" in words and WRONG_TOKEN not in words


def test_a_repository_of_ones_own_token(hub, folder):
    assert room.publish(folder, TO, token=TOKEN).commit
    assert hub.files(TO)[WEIGHTS] == (folder / WEIGHTS).read_bytes()


def test_gated_names_and_no_network_are_told_apart(signed_in, folder, monkeypatch, tmp_path):
    with pytest.raises(room.PublishError, match="is not a valid name for a Hub repository"):
        room.publish(folder, "a/b/c")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(room.PublishError, match="HF_HUB_OFFLINE is set"):
        room.publish(folder, TO)
    signed_in.address = "http://127.0.0.1:9"
    connect(signed_in, monkeypatch, tmp_path)
    with pytest.raises(room.PublishError, match="the Hub did not respond"):
        room.publish(folder, TO)
