"""Nothing leaves this machine before the folder has passed the checks."""

import json

import pytest
import torch

from lightning_flows.hub import check_folder, push, push_to_hub, read_header, save_pretrained
from lightning_flows.store import Recorded, load_tensors, read_config


@pytest.fixture
def hub(monkeypatch):
    """Records what would be uploaded."""
    import huggingface_hub

    calls = []

    class Api:
        def __init__(self, **options):
            calls.append(("api", options))

        def create_repo(self, repo_id, **options):
            calls.append(("create_repo", repo_id, options))

        def create_branch(self, repo_id, **options):
            calls.append(("create_branch", repo_id, options))

        def create_commit(self, repo_id, operations, **options):
            files = {item.path_in_repo: item.path_or_fileobj.read_bytes() for item in operations}
            calls.append(("create_commit", repo_id, files, options))
            return type("Commit", (), {"commit_url": f"https://hub/{repo_id}/commit/1"})

    class Operation:
        def __init__(self, path_in_repo, path_or_fileobj):
            self.path_in_repo, self.path_or_fileobj = path_in_repo, path_or_fileobj

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "CommitOperationAdd", Operation)
    return calls


def set_config(folder, config):
    (folder / "config.json").write_text(json.dumps(config))


def codec(weights):
    inner = {"class_path": "lightning_flows.codecs.AutoencoderKL", "init_args": weights}
    return {"class_path": "torch.nn.Sequential", "init_args": {"codec": inner}}


def test_a_good_folder_passes(folder):
    assert check_folder(folder) == folder


def test_a_push_makes_the_repository_the_branch_and_one_commit(folder, hub):
    url = push(folder, "org/tiny", private=True, token="t", revision="trial", message="new")
    assert url == "https://hub/org/tiny/commit/1"
    assert [call[0] for call in hub] == ["api", "create_repo", "create_branch", "create_commit"]
    assert hub[0][1]["token"] == "t"
    assert hub[1][2] == {"private": True, "exist_ok": True}
    assert hub[3][3] == {"commit_message": "new", "revision": "trial"}


def break_nothing(folder):
    pass


BREAKS = {
    "config": lambda folder: (folder / "config.json").unlink(),
    "foreign": lambda folder: set_config(folder, {"class_path": "os.system", "init_args": {}}),
    "weights": lambda folder: (folder / "model.safetensors").write_bytes(b"\x80\x02}."),
    "card": lambda folder: (folder / "README.md").unlink(),
    "licence": lambda folder: (folder / "README.md").write_text("---\ntags: [a]\n---\n# card\n"),
    "header": lambda folder: (folder / "README.md").write_text("---\na: [\n---\n"),
}
MESSAGES = {
    "config": "does not exist",
    "foreign": "'os.system' is not a class of",
    "weights": "is a pickle",
    "card": "states no licence",
    "licence": "states no licence",
    "header": "is not YAML",
}


@pytest.mark.parametrize("broken", sorted(BREAKS))
def test_an_unfit_folder_is_refused_before_anything_is_sent(folder, hub, broken):
    BREAKS[broken](folder)
    with pytest.raises(ValueError, match=MESSAGES[broken]):
        push(folder, "org/tiny")
    assert hub == []


@pytest.mark.parametrize("repo_id", ["tiny", "org/", "org/a/b", "../x", ""])
def test_a_repository_is_named_org_name(folder, hub, repo_id):
    with pytest.raises(ValueError, match="is not of the form org/name"):
        push(folder, repo_id)
    assert hub == []


@pytest.mark.parametrize("place", ["/data/vae", "./vae", "../vae", "~/vae", "a/b/vae", "C:\\vae", "here"])
def test_a_codec_with_local_weights_is_refused_with_the_fix(folder, hub, place, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    set_config(folder, codec({"repo": place}))
    with pytest.raises(ValueError, match=r"config.codec.repo=") as caught:
        push(folder, "org/tiny")
    assert "lightning-flows push" in str(caught.value)
    assert "org/name@revision" in str(caught.value)
    assert hub == []


def test_a_codec_with_published_weights_is_fine(folder, hub):
    set_config(folder, codec({"repo": "org/vae@abc", "subfolder": "models/kl/vae"}))
    push(folder, "org/tiny")
    assert hub[-1][0] == "create_commit"


def test_a_failure_of_the_hub_is_one_sentence(folder, hub, monkeypatch):
    import huggingface_hub

    def fail(self, *args, **options):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", fail)
    with pytest.raises(RuntimeError, match=r"push of .* to org/tiny failed \(no route to host\)"):
        push(folder, "org/tiny")


class Tiny(Recorded, torch.nn.Linear):
    def __init__(self, size: int = 2) -> None:
        super().__init__(size, 1)


def test_a_model_is_saved_with_a_card_that_stays_when_it_is_there(tmp_path):
    model = Tiny(3)
    folder = save_pretrained(model, tmp_path / "out", licence="mit", data="digits")
    assert read_config(folder) == model.config
    assert load_tensors(folder / "model.safetensors").keys() == model.state_dict().keys()
    assert read_header(folder)["license"] == "mit"
    (folder / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n")
    save_pretrained(model, folder, licence="mit")
    assert read_header(folder)["license"] == "cc-by-4.0"


def test_a_model_is_pushed_in_one_line(hub):
    with pytest.warns(UserWarning, match="no licence given"):
        push_to_hub(Tiny(), "org/tiny", trust_remote_code=True)
    files = hub[-1][2]
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    assert b'from_pretrained("org/tiny")' in files["README.md"]
    assert json.loads(files["config.json"]) == Tiny().config


def test_the_saving_of_the_module_itself_is_used(hub):
    class Own(Tiny):
        def save_pretrained(self, folder):
            save_pretrained(Tiny(5), folder)

    push_to_hub(Own(), "org/tiny", licence="mit", trust_remote_code=True)
    assert json.loads(hub[-1][2]["config.json"]) == Tiny(5).config
