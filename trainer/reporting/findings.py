"""What a report page can show. Whatever is absent is said on the page, in the words of `missing`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Frame:
    """One noise level of one held-out image; pictures as data URIs, `kept` the natural share."""

    time: str
    noisy: str
    probability: str
    retained: str
    kept: float


@dataclass
class Strip:
    name: str
    frames: list[Frame]


@dataclass
class ClassMaps:
    """A class in the router's table: a held-out picture of it, its probability map at each time (data URIs), and
    the mean natural share at each time over `images` pictures of the class."""

    name: str
    picture: str
    maps: list[str]
    shares: list[float]
    images: int


@dataclass
class Budget:
    """One tail drop: (class name, picture) with the share kept and GFLOPs per picture, both means."""

    tail_drop: float
    pictures: list[tuple[str, str]]
    kept: float | None
    gflops: float
    steps: int


@dataclass
class Findings:
    """What was found out about a run. Where nothing was found the list is empty and `missing` says why."""

    title: str
    lead: str = ""
    facts: list[tuple[str, str, str]] = field(default_factory=list)  # what, value, small print
    train: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    class_names: list[str] = field(default_factory=list)
    target_ratio: float | None = None
    samples: list[tuple[str, str]] = field(default_factory=list)
    sample_words: str = ""
    strips: list[Strip] = field(default_factory=list)
    strip_words: str = ""
    strip_range: tuple[float, float] = (0.0, 1.0)  # the probabilities at the ends of the colour scale
    times: list[str] = field(default_factory=list)  # of the columns of `class_maps`
    class_maps: list[ClassMaps] = field(default_factory=list)
    share_by_time: list[float] = field(default_factory=list)
    share_by_class: list[float] = field(default_factory=list)
    share_words: str = ""
    budgets: list[Budget] = field(default_factory=list)
    elastic: dict[str, Any] = field(default_factory=dict)  # elastic.json as `elastic.read` checks it
    flops: list[tuple[str, float, float]] = field(default_factory=list)  # component, as kept, all tokens kept
    flops_words: str = ""
    config: str = ""
    missing: dict[str, str] = field(default_factory=dict)
    footer: str = ""
