"""A card for each scheme of an experiment: `cards.json`, from which study/atlas.py makes pages without a model.

A card has the description in the scheme's file (its docstring has title, formula, source, and what happens past
the trained length) and facts about one trained run: parameters, time, and how far its bias lets a query see.
"""

from __future__ import annotations

import inspect
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from alibi_lm import runtime
from alibi_lm.evaluate.config import EvaluateConfig
from alibi_lm.evaluate.plan import PlannedRun, plan
from alibi_lm.files import write_json
from alibi_lm.load import load_run
from alibi_lm.model.transformer import TransformerLM
from alibi_lm.positions import PositionScheme

HOOKS = {
    "add_to_embeddings": "word embeddings",
    "transform_qk": "queries and keys",
    "distance_bias": "scores, by distance",
    "bias": "scores, by positions",
    "content_key_bias": "scores, by what the key and the tokens before it are",
    "content_bias": "scores, by content",
    "scores": "scores in place of q . k",
    "value_bias": "values, by positions",
}
"""What a scheme acts on, by the hooks that it overrides."""
SHARE = 0.99
FACTOR = 8
"""Training lengths at which an evaluation is timed."""
FAR = 64
"""Training lengths over which the weight of distances is summed."""


def write_cards(config: EvaluateConfig) -> None:
    """Write a card for each scheme and its settings, of the run with the lowest seed, beside the results.

    Raises:
        ValueError: no finished runs, or one that cannot be loaded.
    """
    runtime.start(config.device, threads=config.threads or 1)
    runs, _ = plan(config)
    first: dict[str, PlannedRun] = {}
    for run in sorted(runs, key=lambda run: (run.config.seed, run.name)):
        first.setdefault(f"{run.config.position} {run.config.train_length}", run)
    path = config.output / "cards.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    chosen = tqdm(first.values(), desc="cards", disable=None)
    write_json(path, {"cards": [card(run.folder, run) for run in chosen]})
    print(path)


def card(folder: Path, run: PlannedRun) -> dict[str, Any]:
    """The card of one run's scheme: plain values."""
    settings, length = run.config.position, run.config.train_length
    model = load_run(folder)
    scheme = model.schemes[0]
    positions = scheme.training_positions(torch.Generator(), length)
    drawn = [] if positions is None else ["positions, drawn in training"]
    cost = {"train": seconds_per_token(model, length, True)}
    if not model.max_length or model.max_length >= FACTOR * length:
        cost["evaluate"] = seconds_per_token(model, FACTOR * length, False)
    return {
        "run": run.name,
        "position": settings.name,
        **told(sys.modules[type(settings).__module__].__doc__ or "", inspect.getdoc(type(settings)) or ""),
        "acts_on": [words for hook, words in HOOKS.items() if scheme.defines(hook)] + drawn,
        "parameters": model.position_parameters(),
        "receptive_field": receptive_field(scheme, length),
        "seconds_per_token": cost,
    }


def seconds_per_token(model: TransformerLM, length: int, backward: bool, passes: int = 12) -> float:
    """Processor time per token, in seconds, of a pass over 2,048 tokens or one sequence: the minimum over passes.

    Other work on the machine makes a pass slower, never faster, and hardly affects processor time.

    Args:
        model: a run's model, on the CPU.
        length: tokens per sequence.
        backward: also compute the gradient of all parameters, as in training.
        passes: how many are timed, after one that is not.
    """
    model.serve(length)
    model.train(backward)
    tokens = torch.randint(model.vocab_size, (max(1, 2048 // length), length))
    times = []
    for _ in range(passes + 1):
        began = time.process_time()
        with torch.set_grad_enabled(backward):
            nats = model.nats(tokens, tokens).sum()
            if backward:
                nats.backward()
        times.append(time.process_time() - began)
    return min(times[1:]) / tokens.numel()


def told(of_file: str, of_class: str) -> dict[str, str]:
    """Title, formula, source and behaviour past the trained length, from the docstring of a scheme's file.

    A file without a source is that of the protocol; the class then describes its scheme.
    """
    text = of_file if "Source:" in of_file else of_class
    formula = [line.strip() for line in text.split("\n") if line.startswith("    ") and line.strip()]

    def part(name: str) -> str:
        found = re.search(rf"^{name}: (.*?)(?=\n\n|\nDiffers|\Z)", text, re.DOTALL | re.MULTILINE)
        return " ".join(found[1].split()) if found else ""

    return {
        "title": " ".join(text.split("\n\n")[0].split()),
        "formula": "\n".join(formula),
        "source": part("Source"),
        "beyond": part("Past the trained length"),
    }


def receptive_field(scheme: PositionScheme, train_length: int) -> list[int] | None:
    """Distance within which the bias alone keeps 99% of the weight: the shortest and the longest of all heads.

    Source: the tail sum of Qin et al. 2023, arXiv 2307.10156, over 64 L distances, all scores equal.
    None if the scheme has no bias by distance; 64 L if the weight does not fall off.
    """
    far = FAR * train_length
    with torch.no_grad():
        bias = scheme.distance_bias(torch.arange(far))
    if bias is None:
        return None
    weights = bias.double().softmax(dim=-1).cumsum(dim=-1)
    reach = (weights < SHARE).sum(dim=-1) + 1
    return [int(reach.min()), int(reach.max())]
