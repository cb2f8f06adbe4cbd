"""What the settings of every study must satisfy; each check is one sentence. Knows no study."""

from collections.abc import Sequence


def check_counts(settings: object, *names: str) -> None:
    """Refuse a number of anything under 1.

    Raises:
        ValueError: naming the setting and its value.
    """
    for name in names:
        if not getattr(settings, name) >= 1:
            raise ValueError(f"{name}={getattr(settings, name)}: at least 1")


def check_seed(seed: int) -> None:
    """Refuse a seed that some generator would not take."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed}: give an int from 0 to {2**32 - 1}")


def check_window(window: Sequence[float]) -> None:
    """Refuse anything but two ascending shares of the depth."""
    if not 0 <= window[0] < window[1] <= 1:
        raise ValueError(f"window={list(window)}: two shares of the depth, ascending, such as [0.3, 0.7]")
