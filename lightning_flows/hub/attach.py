"""Gives every module its ``push_to_hub``: modules may not import the hub, so the hub comes to them."""

from __future__ import annotations

from lightning_flows.hub.push import push_to_hub
from lightning_flows.modules import Publishable

Publishable.push_to_hub = push_to_hub  # type: ignore[attr-defined]
