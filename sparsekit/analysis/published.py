"""What papers report of other models: shown beside a forecast, as published, and never a part of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..patterns import Pattern

SPARSEGPT = "Frantar and Alistarh 2023, arXiv:2301.00774"
WANDA = "Sun et al. 2023, arXiv:2306.11695"


@dataclass(frozen=True)
class Published:
    """Perplexity on WikiText2 of a model, dense and pruned, as ``source`` reports it."""

    model: str
    method: str
    pattern: str
    dense: float
    perplexity: float
    source: str


PUBLISHED: tuple[Published, ...] = (
    *(
        Published(f"OPT-{size}", "sparsegpt", pattern, dense, pruned, SPARSEGPT)
        for size, dense, found in (
            ("125M", 27.66, {"50%": 36.85}),
            ("1.3B", 14.62, {"50%": 17.46}),
            ("6.7B", 10.86, {"50%": 11.55}),
            ("175B", 8.35, {"50%": 8.21, "4:8": 8.45, "2:4": 8.74}),
        )
        for pattern, pruned in found.items()
    ),
    *(
        Published("Llama-2-7B", method, pattern, 5.12, pruned, WANDA)
        for pattern, found in (
            ("50%", {"magnitude": 14.89, "sparsegpt": 6.51, "wanda": 6.42}),
            ("4:8", {"magnitude": 16.48, "sparsegpt": 8.12, "wanda": 7.97}),
            ("2:4", {"magnitude": 54.59, "sparsegpt": 10.17, "wanda": 11.02}),
        )
        for method, pruned in found.items()
    ),
)


def published(patterns: Iterable[str | Pattern]) -> list[Published]:
    """What was published of SparseGPT, whose results are forecast here, at these patterns."""
    asked = {str(Pattern.parse(pattern)) for pattern in patterns}
    return [row for row in PUBLISHED if row.method == "sparsegpt" and row.pattern in asked]
