"""Latents and tokens that were encoded earlier must be those that the model itself would give."""

from __future__ import annotations

import json
from typing import Any

from lightning_flows.codecs import Codec, TextEncoder
from lightning_flows.store import config_of


def check_latents(data: Any, codec: Codec, shape: tuple[int, ...]) -> None:
    """Refuses a data module of cached latents that are not this model's; any other passes.

    Args:
        data: the trainer's data module; one of cached latents has the config of their ``codec`` and their
            ``latent_shape`` (see `data.CachedLatents`).
        codec: the model's.
        shape: (C, H, W) of the model's latents.

    Raises:
        ValueError: latents of another codec (both are named), or of another shape.
    """
    encoded_by, own = getattr(data, "codec", None), config_of(codec)
    if not isinstance(encoded_by, dict):
        return
    if _essence(encoded_by) != _essence(own):
        raise ValueError(
            f"the cached latents were encoded by {json.dumps(encoded_by)}, but the model's codec is {json.dumps(own)}"
        )
    if tuple(data.latent_shape) != shape:
        raise ValueError(f"the cached latents have shape {tuple(data.latent_shape)}, but those of the model {shape}")


def check_tokens(data: Any, text: TextEncoder | None) -> None:
    """Refuses a data module with cached tokens that are not this model's; any other passes.

    Args:
        data: the trainer's data module; one of cached tokens has the config of their text encoder as ``text`` (see
            `data.CachedLatents`).
        text: the model's; None for a model that reads no text.

    Raises:
        ValueError: tokens of another text encoder; both are named.
    """
    encoded_by = getattr(data, "text", None)
    if not isinstance(encoded_by, dict) or text is None:
        return
    if encoded_by != config_of(text):
        raise ValueError(
            f"the cached tokens were encoded by {json.dumps(encoded_by)}, but the model's text encoder is "
            f"{json.dumps(config_of(text))}: encode again, into another folder"
        )


def _essence(codec: dict[str, Any]) -> dict[str, Any]:
    """A codec's config without what only says how its posterior is drawn from."""
    return {**codec, "init_args": {name: v for name, v in codec["init_args"].items() if name != "posterior"}}
