"""The real client against a Hub on this machine: what arrives is whole, what fails leaves nothing wrong."""

import pytest

from tests.hub.fake_hub import FakeHub

DOWNLOAD = """
import importlib
from lightning_flows.store import Pin, load_tensors, resolve
def attempt(*args, **options):
    try:
        print(resolve(*args, **options).name)
    except ValueError as error:
        print(error)
folder = resolve("org/tiny")
weight = load_tensors(folder / "model.safetensors")["weight"]
print(sorted(path.name for path in folder.iterdir()), weight.sum())
attempt("org/tiny@{first}")
attempt("org/tiny", revision="absent")
attempt("org/absent")
pinned = importlib.import_module("lightning_flows.store.resolve").PINNED
pinned["tiny"] = Pin("{pinned}", "{good}")
attempt("tiny")
pinned["tiny"] = Pin("{pinned}", "{bad}")
attempt("tiny")
"""


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_download_by_branch_by_revision_and_by_pin(folder, client, monkeypatch):
    from lightning_flows.store.resolve import sha256

    good = sha256(folder / "model.safetensors")
    with FakeHub() as hub:
        first = hub.commit("org/tiny", "main", contents(folder))
        second = hub.commit("org/tiny", "main", {"train.py": b"raise SystemExit", "weights.pkl": b"\x80"})
        pinned = hub.commit("lightning-flows/tiny", "main", contents(folder))
        code = DOWNLOAD.format(first=first, pinned=pinned, good=good, bad="0" * 64)
        files, at_first, no_revision, no_repo, checked, refused = client(code, hub.url)
        assert not [line for line in hub.log if "train.py" in line or "weights.pkl" in line]
    assert files == f"{sorted(contents(folder))} tensor(15.)"
    assert at_first == first != second
    assert no_revision.startswith("ref 'org/tiny' leads to no folder")
    assert "org/tiny@absent on the Hub" in no_revision
    assert no_repo.startswith("ref 'org/absent' leads to no folder")
    assert checked == pinned
    assert refused.startswith("'tiny': ")
    assert f"has SHA-256 {good} instead of the pinned {'0' * 64}" in refused


PUSH = """
from lightning_flows.hub import push
try:
    print(push({folder!r}, "org/tiny", revision={revision!r}))
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize("revision", [None, "trial"])
def test_an_upload_is_one_commit_that_arrives_complete(folder, client, revision):
    (folder / ".hidden.json").write_text("{}")
    (folder / "last.ckpt").write_bytes(b"\x80")
    with FakeHub() as hub:
        (url,) = client(PUSH.format(folder=str(folder), revision=revision), hub.url)
        branch = revision or "main"
        ((sha, files),) = hub.repos["org/tiny"][branch]
    assert url == f"{hub.url}/org/tiny/commit/{sha}"
    published = {name: data for name, data in contents(folder).items() if name not in (".hidden.json", "last.ckpt")}
    assert files == published


def test_an_upload_that_fails_half_way_leaves_the_last_version(folder, client):
    before = contents(folder)
    with FakeHub() as hub:
        hub.commit("org/tiny", "main", before)
        (folder / "recipe.yaml").write_text("model: {changed: 1}\n")
        hub.refuse = ["/large/", "/commit/"]  # the weights, then the commit itself
        lines = client(PUSH.format(folder=str(folder), revision=None) * 3, hub.url)
        commits = [files for _, files in hub.repos["org/tiny"]["main"]]
    assert hub.refuse == []
    assert all(line.startswith(f"push of {folder} to org/tiny failed (") for line in lines[:2])
    assert lines[2].startswith(f"{hub.url}/org/tiny/commit/")
    assert commits == [before, contents(folder)]
