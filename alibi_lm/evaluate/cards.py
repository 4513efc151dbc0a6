"""A card for each scheme of an experiment, written as `cards.json` for pages that know no model (study/atlas.py).

A card says what the scheme's file says of it (its docstring has title, formula, source, and what holds past the
trained length), and what can be read off one trained run: parameters, and how far its bias lets a query see.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import torch

from alibi_lm.evaluate.config import EvaluateConfig
from alibi_lm.evaluate.plan import PlannedRun, plan
from alibi_lm.files import write_json
from alibi_lm.positions import PositionScheme
from alibi_lm.runs import load_run

HOOKS = {
    "add_to_embeddings": "word embeddings",
    "transform_qk": "queries and keys",
    "distance_bias": "scores, by distance",
    "bias": "scores, by positions",
    "content_bias": "scores, by content",
    "training_positions": "positions in training",
}
"""What a scheme acts on, by the hooks that it overrides."""
SHARE = 0.99
FAR = 64
"""Training lengths over which the weight of distances is summed."""


def write_cards(config: EvaluateConfig) -> None:
    """Write the card of each scheme, of its run with the lowest seed, beside the experiment's results.

    Raises:
        ValueError: no finished runs, or one that cannot be loaded.
    """
    runs, _ = plan(config)
    first: dict[str, PlannedRun] = {}
    for run in sorted(runs, key=lambda run: (run.config.seed, run.name)):
        first.setdefault(run.config.position.name, run)
    path = config.output / "cards.json"
    write_json(path, {"cards": [card(run.folder, run) for _, run in sorted(first.items())]})
    print(path)


def card(folder: Path, run: PlannedRun) -> dict[str, Any]:
    """The card of one run's scheme: plain values."""
    settings = run.config.position
    model = load_run(folder)
    scheme = model.schemes[0]
    own = sum(p.numel() for scheme in model.schemes for p in scheme.parameters())
    return {
        "run": run.name,
        "position": settings.name,
        **told(sys.modules[type(settings).__module__].__doc__ or "", inspect.getdoc(type(settings)) or ""),
        "acts_on": [words for hook, words in HOOKS.items() if scheme.defines(hook)],
        "parameters": own,
        "invariant": scheme.translation_invariant,
        "limit": scheme.max_position,
        "receptive_field": receptive_field(scheme, run.config.train_length),
    }


def told(of_file: str, of_class: str) -> dict[str, str]:
    """Title, formula, source and what holds past the trained length, from the docstring of a scheme's file.

    A file without a source is the protocol's, whose scheme is described by its class alone.
    """
    text = of_file if "Source:" in of_file else of_class
    formula = [line.strip() for line in text.split("\n") if line.startswith("    ") and line.strip()]

    def part(name: str) -> str:
        found = re.search(rf"^{name}: (.*?)(?=\n\n|\nDiffers|\Z)", text, re.DOTALL | re.MULTILINE)
        return " ".join(found[1].split()) if found else ""

    title = " ".join(text.split("\n\n")[0].split())
    return {
        "title": title,
        "formula": "\n".join(formula),
        "source": part("Source"),
        "beyond": part("Past the trained length"),
    }


def receptive_field(scheme: PositionScheme, train_length: int) -> list[int] | None:
    """Distance within which the bias alone keeps 99% of the weight: the shortest and the longest of the heads.

    Source: the tail sum of Qin et al. 2023, arXiv 2307.10156, over the first 64 L distances, with all scores equal.
    None where the scheme has no bias by distance; 64 L where the weight never runs out.
    """
    far = FAR * train_length
    with torch.no_grad():
        bias = scheme.distance_bias(torch.arange(far))
    if bias is None:
        return None
    weights = bias.double().softmax(dim=-1).cumsum(dim=-1)
    reach = (weights < SHARE).sum(dim=-1) + 1
    return [int(reach.min()), int(reach.max())]
