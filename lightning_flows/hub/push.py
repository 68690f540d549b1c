"""To the Hub: a folder is checked first, then uploaded in one commit, all of it or nothing.

The check is what a stranger's ``from_pretrained`` will do, and two things only the author can mend: a card
with a licence, and a codec whose weights others can reach.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lightning_flows.hub.adapters import check_adapter, is_adapter, write_adapter_card
from lightning_flows.hub.cards import CARD, read_header, write_card
from lightning_flows.hub.licences import NOTE, is_licence
from lightning_flows.store import WEIGHTS, check, config_of, entries, load_tensors, read_config, save_folder
from lightning_flows.store.resolve import one_line

SUFFIXES = {".json", ".safetensors", ".md", ".yaml", ".png", ".jpg", ".gif", ".mp4", ".glb", ".ply"}
_REPO = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_PLACES = {"weights", "repo", "folder", "path", "file", "root", "checkpoint", "pretrained", "tokenizer"}
_INSIDE = {"subfolder", "revision"}  # these name something inside a repository


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    message: str | None = None,
    licence: str | None = None,
    trust_remote_code: bool = False,
) -> str:
    """Upload the folder of a model or of an adapter to the Hugging Face Hub in one commit.

    Args:
        folder: ``config.json``, ``model.safetensors`` (of an adapter: what `networks.save_adapter` writes), a card with
            a licence, and what else stands beside them (recipe, metrics, pictures, LICENSE); files of other kinds
            and subfolders stay at home.
        repo_id: ``org/name``; made if it does not exist.
        private: make a new repository private.
        token: of the Hub's client; None takes the stored one.
        revision: branch to commit to; made if it does not exist.
        message: of the commit.
        licence: of an adapter without a card: one is written to its folder.
        trust_remote_code: the config may name classes of other packages, which users must consent to.

    Returns:
        Address of the commit.

    Raises:
        ValueError: the folder is not fit to be published; says what to mend.
        RuntimeError: the Hub failed; the repository then holds the whole commit or nothing of it.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    if not _REPO.fullmatch(repo_id):
        raise ValueError(f"repo_id={repo_id!r} is not of the form org/name.")
    if licence is not None:
        if not is_adapter(folder) or (Path(folder) / CARD).exists():
            raise ValueError(f"licence={licence!r} is for an adapter without a card; otherwise the card states it.")
        write_adapter_card(folder, licence=licence, model_id=repo_id)
    source = check_folder(folder, trust_remote_code=trust_remote_code)
    api = HfApi(token=token, library_name="lightning_flows")
    # Not upload_folder: where Xet is installed it commits in batches, and half a model could be left behind.
    operations = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file) for file in _files(source)]
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if revision not in (None, "main"):
            api.create_branch(repo_id, branch=str(revision), exist_ok=True)
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=message or f"Upload {source.resolve().name}",
            revision=revision,
        )
    except Exception as error:  # the client's errors share no base class; the cause stays attached
        raise RuntimeError(
            f"push of {source} to {repo_id} failed ({one_line(error)}); the repository holds all of the "
            "commit or nothing of it, so push again."
        ) from error
    return str(commit.commit_url)


def check_folder(folder: str | Path, *, trust_remote_code: bool = False) -> Path:
    """Refuse a folder that others could not load or may not use; nothing is uploaded.

    Returns:
        The folder.

    Raises:
        ValueError: config, weights, card or codec are not fit to be published; says what to mend.
    """
    source = Path(folder)
    if is_adapter(source):
        return check_adapter(source)
    config = read_config(source)
    check(config, trust_remote_code=trust_remote_code)
    load_tensors(source / WEIGHTS)
    if (source / NOTE).exists():
        raise ValueError(
            f"{source} lacks the agreement that its weights must not be without: put its text there (LICENSE) and "
            f"remove {NOTE}, which says where it is."
        )
    if not read_header(source).get("license"):
        raise ValueError(f"{source / CARD} states no licence: write 'license: <identifier>' into its header.")
    for where, value in _local_weights(config):
        raise ValueError(
            f"{where}={value!r} is a path on this machine, which nobody else can load: publish those weights "
            f"(lightning-flows push {value} org/name) and put org/name@revision into the config."
        )
    return source


def push_to_hub(
    model: Any,
    repo_id: str,
    *,
    licence: str | None = None,
    metrics: Mapping[str, Any] | None = None,
    private: bool = False,
    token: str | None = None,
    revision: str | None = None,
    message: str | None = None,
    trust_remote_code: bool = False,
    **about: Any,
) -> str:
    """Save a model with a card to a temporary folder and `push` it.

    Args:
        model: a `Recorded` module.
        repo_id: ``org/name``.
        licence: of the weights, an identifier of the Hub; without one the card says ``unknown``, with a
            warning.
        metrics: figures for the card, see `cards.figures`.
        private: make a new repository private.
        token: of the Hub's client.
        revision: branch to commit to.
        message: of the commit.
        trust_remote_code: the config may name classes of other packages.
        **about: further keyword arguments of `cards.card`.

    Returns:
        Address of the commit.

    Raises:
        ValueError: the model is not fit to be published.
        RuntimeError: the Hub failed.
    """
    if licence is None:
        warnings.warn("no licence given: the card says 'unknown', so nobody may use the weights.")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / repo_id.rpartition("/")[2]
        save_pretrained(model, folder, licence=licence or "unknown", metrics=metrics, model_id=repo_id, **about)
        return push(
            folder,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            message=message or f"Upload {type(model).__name__}",
            trust_remote_code=trust_remote_code,
        )


def save_pretrained(
    model: Any,
    folder: str | Path,
    *,
    licence: str = "unknown",
    metrics: Mapping[str, Any] | None = None,
    **about: Any,
) -> Path:
    """Write a model folder with a card; the module's own ``save_pretrained`` picks the tensors.

    Args:
        model: a `Recorded` module.
        folder: target; a card that lies there already stays as it is.
        licence: of the weights.
        metrics: figures for the card, see `cards.figures`.
        **about: further keyword arguments of `cards.card`.

    Returns:
        The folder.
    """
    target, config = Path(folder), config_of(model)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(target)
    else:
        save_folder(target, config, model.state_dict())
    if not (target / CARD).exists():
        write_card(target, config, metrics, licence=licence, **about)
    return target


def _files(folder: Path) -> list[Path]:
    visible = (path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    return sorted(path for path in visible if path.suffix in SUFFIXES or is_licence(path))


def _local_weights(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Arguments of codecs that name a place on this machine."""
    for where, entry in entries(config):
        if not entry["class_path"].startswith("lightning_flows.codecs."):
            continue
        for key, value in entry.get("init_args", {}).items():
            if isinstance(value, str) and key not in _INSIDE and _is_local(key, value):
                yield f"{where}.{key}", value


def _is_local(key: str, value: str) -> bool:
    if "://" in value:
        return False
    if value.startswith(("/", ".", "~", "\\")) or value[1:3] in (":\\", ":/") or value.count("/") > 1:
        return True
    return ("/" in value or key in _PLACES) and Path(value).exists()
