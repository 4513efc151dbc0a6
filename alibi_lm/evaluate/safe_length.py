"""How long a model's input may be: up to which length its loss stays within 1% of that at its training length.

The loss at a length is that of nonoverlapping windows, so the same tokens are scored at each length, and
differences are paired by document. A longer window also has fewer tokens with a short context, which lowers its
loss: `view=decomposition` separates that from the effect of the additional tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alibi_lm.evaluate.views import Group, Point, perplexity

ALLOWED = 0.01
"""Relative rise of the loss that counts as safe."""


def safe_length(group: Group, lengths: Sequence[int]) -> dict[str, Any]:
    """The training length and all longer ones: mean loss, and its `excess` over that at the training length.

    Returns:
        points: those of `perplexity`. `excess` holds `share` (0.02: the loss is 2% higher) and the ends of its 95%
            interval, `low` and `high`, which are None if the text is a single document.
        safe_length: the longest length up to which the loss stays within ALLOWED at every tested length; the
            training length if none is safe, None if nothing could be tested.
        safe_length_low: the same, but the whole interval must be within.
        safe_length_high: the same, but any part of the interval may be within.
        verdict: the result in words.
    """
    trained = group.train_length
    points = perplexity(group, sorted({trained, *(n for n in lengths if n > trained)}))
    base = points[0]["nats"]
    for point in points:
        del point["mode"], point["stride"]
        if base and (change := point.get("difference")):
            share, low, high = (None if change[k] is None else change[k] / base for k in ("nats", "low", "high"))
            point["excess"] = {"share": share, "low": low, "high": high}
    tested = [p for p in points[1:] if "excess" in p]
    refused = next((p for p in points[1:] if "excess" not in p), None)
    ends = {
        f"safe_length{suffix}": _up_to(trained, tested, key) if tested else None
        for suffix, key in (("", "share"), ("_low", "high"), ("_high", "low"))
    }
    words = _words(trained, tested, ends["safe_length_low"])
    if refused is not None:
        words += f" At {refused['length']} it cannot be read: {refused['reason']}."
    return {"points": points} | ends | {"verdict": words.strip()}


def _up_to(trained: int, tested: Sequence[Point], key: str) -> int:
    reached = trained
    for point in tested:
        if _end(point, key) > ALLOWED:
            break
        reached = point["length"]
    return reached


def _end(point: Point, key: str) -> float:
    """An end of the interval; the value itself if there is no interval."""
    excess = point["excess"]
    return excess["share"] if excess[key] is None else excess[key]


def _words(trained: int, tested: Sequence[Point], surely: int | None) -> str:
    if surely is None:
        return ""
    interval = tested[0]["excess"]["low"] is not None
    sure = "with 95% confidence" if interval else "without an interval, since the text is one document"
    within = f"its loss stays within {ALLOWED:.0%} of that at its training length of {trained}"
    if surely == tested[-1]["length"]:
        return f"May be read up to {surely} tokens, the longest length tested: {within} ({sure})."
    after = next(p for p in tested if p["length"] > surely)
    found = f"At {after['length']} its loss is {_percent(after)}"
    if _end(after, "low") <= ALLOWED:
        found += ": whether that is safe is not settled"
        worse = next((p for p in tested if p["length"] > surely and _end(p, "low") > ALLOWED), None)
        found += "" if worse is None else f"; at {worse['length']} it is {_percent(worse)}"
    if surely == trained:
        return f"Is not known to be safe beyond its training length of {trained} tokens. {found}."
    return f"May be read up to {surely} tokens: {within} ({sure}). {found}."


def _percent(point: Point) -> str:
    """`3.2% higher (2.1% to 4.3%)`."""
    share, low, high = (point["excess"][key] for key in ("share", "low", "high"))
    ends = "" if low is None else f" ({low:+.1%} to {high:+.1%})"
    return f"{abs(share):.1%} {'higher' if share >= 0 else 'lower'}{ends}"
