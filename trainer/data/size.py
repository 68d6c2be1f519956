"""The size of pictures: (height, width) in pixels, written as one number where they are square."""

import re

from model.errors import UserError

Size = tuple[int, int]


def as_size(value: "int | Size | list[int]") -> Size:
    """(height, width) of a side or a pair."""
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def parse_size(text: str) -> Size:
    """`256` or `192x320`, height first. Raises UserError for anything else."""
    found = re.fullmatch(r"(\d+)(?:[x×](\d+))?", text.strip().lower())
    if not found:
        raise UserError(f"--size {text}: give one side, or height and width: 256, 192x320 or 192 320")
    return int(found[1]), int(found[2] or found[1])


def in_words(size: Size) -> str:
    """256x256."""
    return f"{size[0]}x{size[1]}"


def as_flag(size: Size) -> str:
    """As one would type it: 256 or 192x320."""
    return str(size[0]) if size[0] == size[1] else in_words(size)


def brief(size: Size) -> "int | list[int]":
    """As it stands in a manifest's recipe, which is JSON: one number for a square."""
    return size[0] if size[0] == size[1] else list(size)


def join_sizes(arguments: list[str]) -> list[str]:
    """`--size 192 320` as `--size 192x320`; an option of two values would swallow a folder after `--size 256`."""
    joined: list[str] = []
    for word in arguments:
        if len(joined) > 1 and joined[-2] == "--size" and joined[-1].isdigit() and word.isdigit():
            joined[-1] += f"x{word}"
        else:
            joined.append(word)
    return joined
