"""How far several studies or jobs are, in words: the time so far, and what is left if the others take as long. Knows no clock."""


def pace(seconds: float, done: int, left: int) -> str:
    """· 4 min so far, about 12 min left at this pace"; "" before anything is done, for then nobody knows.

    Args:
        seconds: what those that are done took.
        left: those still to come, the one that begins now among them.
    """
    return f" · {spoken(seconds)} so far, about {spoken(seconds / done * left)} left at this pace" if done else ""


def spoken(seconds: float) -> str:
    """As one says it: 40 s, 4 min, 1 h 20 min."""
    if seconds < 59.5:
        return f"{max(seconds, 1):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min" if minutes % 60 else f"{minutes // 60} h"
