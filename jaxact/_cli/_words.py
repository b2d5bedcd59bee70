"""What the texts of the commands share: nouns after numbers, names that are the user's, and columns."""

import re


def plural(noun: str, number: int) -> str:
    """The noun as it stands after the number."""
    return noun if number == 1 else f"{noun}s"


def drawable(name: str) -> str:
    """The name in a figure: neither fonts nor XML have control characters, surrogates, U+FFFE and U+FFFF."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", name)


def in_columns(texts: tuple[str, ...], widths: tuple[int, ...]) -> str:
    """A line of a table. Negative widths are of columns that are flush left."""
    parts = [
        f"{text:>{width}}" if width > 0 else f"{text:<{-width}}" for text, width in zip(texts, widths, strict=True)
    ]
    return "  " + "  ".join(parts).rstrip()
