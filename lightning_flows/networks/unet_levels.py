"""The levels of a U-Net: their widths, the sides of their maps, and which of them attend."""

from __future__ import annotations

from collections.abc import Sequence


def level_widths(hidden_size: int, channel_mult: Sequence[float]) -> list[int]:
    """Channels of each level, fine to coarse.

    Raises:
        ValueError: no level, or a width that is no positive integer.
    """
    check_positive(hidden_size=hidden_size)
    widths = [hidden_size * factor for factor in channel_mult]
    if not widths or any(width < 1 or width != round(width) for width in widths):
        raise ValueError(
            f"channel_mult must name factors that give whole widths with hidden_size={hidden_size}, "
            f"got {list(channel_mult)}"
        )
    return [round(width) for width in widths]


def sides(input_size: int | Sequence[int]) -> tuple[int, int]:
    """(height, width) of a side or a pair.

    Raises:
        ValueError: neither, or a side below 1.
    """
    both = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    if len(both) != 2 or min(both) < 1:
        raise ValueError(f"input_size must be one positive number or (height, width), got {input_size!r}")
    return both[0], both[1]


def attend_where(name: str, asked: Sequence[int], levels: Sequence[int]) -> list[bool]:
    """For each level whether it attends: its number is among those that were asked for.

    Raises:
        ValueError: a number that no level has: that attention would silently not be there.
    """
    if unknown := sorted(set(asked) - set(levels)):
        raise ValueError(f"{name} must be among {list(levels)} (one for each level), got {unknown}")
    return [level in asked for level in levels]


def check_positive(**sizes: int) -> None:
    """Raises a ValueError that names the first argument below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be positive, got {size}")
