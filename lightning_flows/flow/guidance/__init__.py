"""Guidance: a conditional velocity pushed away from a worse one."""

from lightning_flows.flow.guidance.base import Companion, Guidance, Guided
from lightning_flows.flow.guidance.rules import (
    AdaptiveProjected,
    Autoguidance,
    ClassifierFree,
    RatioAware,
    ZeroStar,
)

__all__ = [
    "AdaptiveProjected",
    "Autoguidance",
    "ClassifierFree",
    "Companion",
    "Guidance",
    "Guided",
    "RatioAware",
    "ZeroStar",
]
