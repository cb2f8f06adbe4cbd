"""Colours that are told apart by the colour-blind, and what becomes of one on a dark ground. Knows no figure."""

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000")  # Okabe and Ito; grey for their yellow
_DARK = "#16181b"  # the ground of page.css in a dark scheme
_CONTRAST = 4.5  # WCAG asks 3 of graphics; thin lines need more


def on_dark(colour: str) -> str:
    """The colour, or the nearest lighter one that stands out from a dark ground."""
    parts = _parts(colour)
    for share in range(0, 101, 5):
        mixed = tuple(part + (1 - part) * share / 100 for part in parts)
        if _contrast(mixed, _parts(_DARK)) >= _CONTRAST:
            return "#" + "".join(f"{round(part * 255):02x}" for part in mixed)
    return "#ffffff"


def _parts(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))


def _contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """WCAG 2's contrast ratio."""
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(parts: tuple[float, ...]) -> float:
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
