"""What the texts of the commands share: nouns after numbers, and names that are the user's."""

import re


def plural(noun: str, number: int) -> str:
    """The noun as it stands after the number."""
    return noun if number == 1 else f"{noun}s"


def drawable(name: str) -> str:
    """The name in a figure: neither fonts nor XML have control characters, surrogates, U+FFFE and U+FFFF."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", name)
