"""Files from the Hub: whole and as they were published, or not used; and one sentence about what went wrong."""

import hashlib
import traceback
from pathlib import Path

import checkpoints
import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save
from server import TOKEN, connect

from parameternet import weights

NAME = checkpoints.NAME
OURS = f"parameternet/{NAME}"
REPOSITORY = "somebody/net"
CFG = {"source": "hf-hub", "hf_hub_id": REPOSITORY}
TENSORS = {"weight": torch.arange(3000.0), "bias": torch.ones(7).half()}
FILE = save(TENSORS)  # as others write it: no digest of ours inside
CONFIG = b'{"architecture": "parameternet_50m", "pretrained_cfg": {"num_classes": 5}}'
WRONG_TOKEN = "hf_" + "Expired7" * 4


@pytest.fixture
def foreign(hub):
    """Somebody's repository."""
    hub.put(REPOSITORY, {"model.safetensors": FILE, "config.json": CONFIG})
    return hub


@pytest.fixture
def ours(hub, monkeypatch, tmp_path):
    """Our recorded checkpoint is on the Hub, and only there."""
    folder = checkpoints.write(tmp_path / "made" / NAME)
    checkpoints.record(monkeypatch, folder)
    monkeypatch.delenv("PARAMETERNET_WEIGHTS")
    hub.put(OURS, folder)
    return hub


def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def assert_read(cfg=CFG, **kwargs):
    found = weights.resolve(cfg, **kwargs)
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def blobs():
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    return [path for path in cache.rglob("blobs/*") if path.is_file()]


def assert_cache_is_sound():
    for path in blobs():
        data = path.read_bytes()
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        assert path.name in (hashlib.sha256(data).hexdigest(), git), f"{path} was left in the cache"


def damage(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.resolve().write_bytes(data)  # of the right size: the Hub's client does not look further


# What goes wrong on the way ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cut", "slow", "flipped"])
def test_a_passing_fault_is_survived(foreign, kind):
    foreign.fail(kind, "GET", "/storage/")
    assert_read()
    assert_cache_is_sound()
    assert len(foreign.asked("GET", "/storage/")) == 2


@pytest.mark.parametrize(
    ("kind", "method", "message"),
    [
        ("500", "HEAD", "the Hub returned an error"),
        ("503", "GET", "the Hub returned an error"),
        ("short", "GET", "the download failed"),
        ("cut", "GET", "the Hub did not respond"),
    ],
)
def test_a_lasting_fault_is_one_sentence_and_leaves_nothing(foreign, kind, method, message):
    foreign.fail(kind, method, "model.safetensors", times=6)
    with pytest.raises(weights.WeightsNotFound, match=f"{message}.*is not in the local Hub cache") as caught:
        weights.resolve(CFG)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(foreign.address)
    assert not blobs()
    foreign.faults.clear()
    assert_read()


def test_a_file_that_stays_wrong_is_refused(foreign):
    foreign.fail("flipped", "GET", "/storage/", times=9)
    with pytest.raises(
        weights.WeightsDamaged, match=r"arrived damaged.*the Hub's digest.*a second copy was damaged too"
    ) as caught:
        weights.resolve(CFG)
    assert "\n" not in str(caught.value)
    assert len(foreign.asked("GET", "/storage/")) == 2 and not blobs()


def test_small_files_are_held_against_gits_name_for_them(foreign):
    foreign.fail("flipped", "GET", "config.json")
    assert weights.config(f"hf-hub:{REPOSITORY}")["pretrained_cfg"] == {"num_classes": 5}
    foreign.put(REPOSITORY, {"config.json": CONFIG.replace(b"5", b"6")})
    foreign.fail("flipped", "GET", "config.json", times=9)
    with pytest.raises(weights.WeightsDamaged, match=r"config\.json arrived damaged"):
        weights.config(f"hf-hub:{REPOSITORY}")


def test_interrupted_download_resumes(hub):
    data = save({"weight": torch.arange(6_000_000.0)})
    hub.put("somebody/large", {"model.safetensors": data})
    hub.fail("cut", "GET", "/storage/")
    found = weights.resolve({"source": "hf-hub", "hf_hub_id": "somebody/large"})
    assert torch.equal(found["weight"], torch.arange(6_000_000.0))
    ranges = [headers.get("Range") for _, path, headers in hub.requests if path.startswith("/storage/")]
    assert ranges == [None, f"bytes={huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE}-"]


# The cache -----------------------------------------------------------------------------------------------------------


def test_the_hub_is_the_last_place_and_is_asked_once(ours):
    assert weights.local(NAME) is None
    weights.find(NAME)
    assert weights.config(NAME)["num_classes"] == 5
    before = len(ours.requests)
    weights.find(NAME), weights.config(NAME)
    assert weights.local(NAME).is_file()
    assert len(ours.requests) == before, "known content in the cache needs no network"


def test_the_cache_serves_when_the_hub_is_gone(ours, foreign, monkeypatch):
    weights.find(NAME), weights.config(NAME), assert_read(), weights.config(f"hf-hub:{REPOSITORY}")
    offline(monkeypatch)
    before = len(ours.requests)
    assert weights.find(NAME).is_file() and weights.config(NAME)["num_classes"] == 5
    assert weights.config(f"hf-hub:{REPOSITORY}")["architecture"] == "parameternet_50m"
    assert_read()
    model = timm.create_model(f"hf-hub:{OURS}", pretrained=True)
    assert torch.equal(model.classifier.weight, checkpoints.network().classifier.weight)
    assert len(ours.requests) == before


@pytest.mark.parametrize("cfg", [CFG, {"architecture": "parameternet_50m", "tag": "tin200"}], ids=["foreign", "ours"])
def test_offline_without_a_cache_says_so(ours, monkeypatch, cfg):
    offline(monkeypatch)
    with pytest.raises(weights.WeightsNotFound, match="HF_HUB_OFFLINE is set, and the file is not in the local"):
        weights.resolve(cfg)


def test_no_network_and_no_cache_is_one_sentence(hub, monkeypatch, tmp_path):
    hub.address = "http://127.0.0.1:9"
    connect(hub, monkeypatch, tmp_path)
    with pytest.raises(
        weights.WeightsNotFound, match=r"the Hub did not respond .* not in the local Hub cache$"
    ) as caught:
        weights.resolve(CFG)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_a_file_damaged_in_the_cache_is_fetched_again(ours, foreign, monkeypatch, links):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_SYMLINKS", not links)
    path = weights.find(NAME)
    damage(path)
    assert weights.find(NAME) == path
    assert weights.read(path, weights.known()[NAME]["sha256"])
    assert_read()
    [copy] = Path(huggingface_hub.constants.HF_HUB_CACHE).glob("models--somebody--net/snapshots/*/model.safetensors")
    assert copy.is_symlink() is links
    damage(copy)
    assert_read()


def test_a_file_damaged_in_the_cache_is_refused_offline(foreign, monkeypatch):
    assert_read()
    damage(blobs()[0])
    offline(monkeypatch)
    with pytest.raises(weights.WeightsDamaged, match=r"was removed from the cache, but .*HF_HUB_OFFLINE is set"):
        weights.resolve(CFG)
    assert not blobs()


def test_damaged_cached_file_is_not_used_locally(ours, monkeypatch):
    damage(weights.find(NAME))
    assert weights.local(NAME) is None


# Who may, and what there is ------------------------------------------------------------------------------------------


def test_file_from_a_foreign_organisation_is_rejected(ours):
    ours.put(OURS, {"model.safetensors": FILE})
    for cfg in ({"architecture": "parameternet_50m", "tag": "tin200"}, {"source": "hf-hub", "hf_hub_id": OURS}):
        with pytest.raises(weights.WeightsDamaged, match=r"not the recorded file.*delete the folder .*models--param"):
            weights.resolve(cfg)


def test_a_digest_of_ours_is_checked_in_repositories_of_others_too(foreign, tmp_path):
    weights.save(TENSORS, tmp_path / "a.safetensors")
    data = bytearray((tmp_path / "a.safetensors").read_bytes())
    data[-1] ^= 1
    foreign.put(REPOSITORY, {"model.safetensors": bytes(data)})  # published as it is, so the Hub's digest is of this
    with pytest.raises(weights.WeightsDamaged, match="not those that were saved"):
        weights.resolve(CFG)


def test_a_revision_can_be_pinned(foreign):
    first = foreign.repositories[REPOSITORY].head("main")
    foreign.put(REPOSITORY, {"model.safetensors": save({"other": torch.zeros(2)})})
    assert list(weights.resolve(CFG)) == ["other"]
    assert_read({"source": "hf-hub", "hf_hub_id": f"{REPOSITORY}@{first}"})
    with pytest.raises(weights.WeightsNotFound, match="no such revision"):
        weights.resolve({"source": "hf-hub", "hf_hub_id": f"{REPOSITORY}@v2"})


@pytest.mark.parametrize(
    ("repository", "token", "message"),
    [
        ("nobody/nothing", None, r"no such repository, or a private one that needs a login \(hf auth login\)"),
        ("nobody/nothing", TOKEN, "no such repository, or a private one that the current token cannot access"),
        ("somebody/private", None, r"no such repository, or a private one that needs a login \(hf auth login\)"),
        ("somebody/gated", None, "is gated: accept its terms on its page"),
        ("somebody/gated", TOKEN, "is gated: accept its terms on its page"),
        (REPOSITORY, WRONG_TOKEN, "rejects the current token, which is wrong or has expired: hf auth login"),
        ("somebody/empty", None, "the repository has no such file"),
        ("a/b/c", None, "is not a valid name for a Hub repository"),
    ],
)
def test_what_cannot_be_had_is_told_apart(foreign, monkeypatch, repository, token, message):
    foreign.put("somebody/private", {"model.safetensors": FILE}, private=True)
    foreign.put("somebody/gated", {"model.safetensors": FILE}, gated=True)
    foreign.put("somebody/empty", {"README.md": b"hello"})
    monkeypatch.setenv("HF_TOKEN", token or "")
    with pytest.raises(weights.WeightsNotFound, match=message) as caught:
        weights.resolve({"source": "hf-hub", "hf_hub_id": repository})
    assert "\n" not in str(caught.value)
    assert not token or token not in "".join(traceback.format_exception(caught.value))


def test_private_repository_is_read_without_leaking_the_token(foreign, monkeypatch):
    foreign.put(REPOSITORY, {}, private=True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert_read()
    signed = {path.split("/")[1] for _, path, headers in foreign.requests if headers.get("Authorization")}
    assert signed == {"somebody"} and foreign.asked("GET", "/storage/")


@pytest.mark.parametrize("token", ["hf_Secret\x00Secret", "hf_S\u00e9cret"])
def test_a_token_that_cannot_be_sent_is_not_shown(foreign, monkeypatch, token):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    Path(huggingface_hub.constants.HF_TOKEN_PATH).parent.mkdir(parents=True)
    Path(huggingface_hub.constants.HF_TOKEN_PATH).write_text(token)
    with pytest.raises(weights.WeightsNotFound) as caught:
        weights.resolve(CFG)
    assert "cret" not in "".join(traceback.format_exception(caught.value))


def test_no_reason_shows_a_token_of_whatever_form(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "one-of-a-mirror")
    for token in (None, "given-by-hand"):
        error = OSError(f"sent one-of-a-mirror, {token or 'nothing'} and hf_{'Abc123' * 6}\nin vain")
        assert "one-of-a" not in weights.hub_reason(error, token) and "Abc123" not in weights.hub_reason(error, token)
        assert "by-hand" not in weights.hub_reason(error, token) and weights.hub_cause(error, token) is None
    assert "by-hand" in weights.hub_reason(OSError("sent given-by-hand"))
    plain = OSError("no space left")
    assert weights.hub_cause(plain) is plain and "no space left" in weights.hub_reason(plain)
