"""Result rows as curves: one line per scheme, training length and recipe, its seeds together.

A view is what one figure or table may show together: one task and metric, one split, one mode, one stride.
A curve is what one line may show: one scheme, one training length, one recipe (all settings but the seed).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath

from alibi_lm.results.rows import ResultRow

CACHE_SETTINGS = ("cache", "lost_share", "window", "sinks")
"""The changes in a row that say which cache a split was streamed through."""
CHECKPOINT = "checkpoint"
"""Name of a change in rows; its value `step:<number>` is a checkpoint from before the end of training."""
NEAR_BEST = 0.01
"""A loss in nats that is above the lowest one by at most this share counts as equally good."""
_HASH = re.compile(r"[0-9a-f]{6,}")
_RUN_NAME = re.compile(r"(?P<position>.+)_L(?P<length>\d+)_s(?P<seed>\d+)(?:_(?P<suffix>.+))?")


@dataclass(frozen=True)
class View:
    """Rows that can be compared: same split, mode, stride, task and metric."""

    split: str
    mode: str
    stride: int | None = None
    task: str = "text"
    metric: str = "perplexity"

    @property
    def title(self) -> str:
        """In words: `validation, sliding window with stride 32`."""
        task = "" if self.task == "text" else f"task {self.task}, "
        if self.mode == "sliding":
            return f"{task}{self.split}, sliding window with stride {self.stride}"
        windows = {"nonoverlapping": "nonoverlapping windows", "stream": "the whole split as one window"}
        return f"{task}{self.split}, {windows.get(self.mode, self.mode)}"

    @property
    def slug(self) -> str:
        """For file names: `validation_sliding32`."""
        task = "" if self.task == "text" else f"{self.task}_{self.metric}_"
        return f"{task}{self.split}_{self.mode}{'' if self.stride is None else self.stride}"


VALIDATION = View("validation", "nonoverlapping")
"""The view in which runs are compared first."""


@dataclass(frozen=True)
class Curve:
    """One metric of one scheme, training length and recipe by inference length, for each of its runs."""

    position: str
    train_length: int
    variant: str
    """How it differs from others of its scheme and length, in words; empty for the experiment's own settings."""
    losses: dict[int, dict[str, float]] = field(default_factory=dict)
    """inference_length -> run -> mean nats per token; for metrics other than perplexity, the value."""
    refused: dict[int, str] = field(default_factory=dict)
    """inference_length -> why at least one run has no value there."""
    seeds: dict[str, int | None] = field(default_factory=dict)
    """run -> seed."""
    metric: str = "perplexity"
    items: dict[int, int] = field(default_factory=dict)
    """inference_length -> number of tokens, or of items of a task (not their questions), that values average."""
    in_reach: dict[int, float] = field(default_factory=dict)
    """inference_length beyond L -> accuracy of a perfect reader of only the last L tokens, where known."""
    beyond: dict[int, dict[str, float]] = field(default_factory=dict)
    """inference_length -> run -> accuracy on the answers that such a reader does not give."""
    items_beyond: dict[int, int] = field(default_factory=dict)
    """inference_length -> number of items that have such answers."""
    streamed: dict[int, dict[str, float]] = field(default_factory=dict)
    """Like `losses`, for the whole split as one window; shown with the view of nonoverlapping windows."""

    @property
    def lengths(self) -> list[int]:
        """Inference lengths with a value, rising."""
        return sorted(self.losses)

    def value(self, length: int) -> float:
        """The metric's mean over the runs.

        Perplexity is exp of the mean loss, which is the geometric mean of the runs' perplexities.
        """
        values = self.losses[length].values()
        return self.shown(math.fsum(values) / len(values))

    def shown(self, value: float) -> float:
        """Convert a number of `losses` to the drawn value."""
        return math.exp(value) if self.metric == "perplexity" else value

    def ratio(self, length: int) -> float | None:
        """Perplexity at `length` over that at the training length, over the runs that have both."""
        own = self.losses.get(self.train_length, {})
        both = [run for run in self.losses.get(length, {}) if run in own]
        if not both or self.metric != "perplexity":
            return None
        return math.exp(math.fsum(self.losses[length][run] - own[run] for run in both) / len(both))

    def doublings(self) -> list[tuple[int, int]]:
        """(Multiple of the training length, inference length) of the values at 2 L, 4 L, 8 L and so on."""
        multiples = [(length // self.train_length, length) for length in self.lengths]
        return [(k, n) for k, n in multiples if k > 1 and not k & (k - 1) and k * self.train_length == n]


def views(rows: Iterable[ResultRow]) -> list[View]:
    """The views of these rows; text first, validation before other splits, nonoverlapping before sliding."""
    found = {view_of(row) for row in rows if row.run is not None}

    def order(view: View) -> tuple[object, ...]:
        usual = (view.split != "validation", view.split, view.mode != "nonoverlapping", view.mode)
        return (view.task != "text", view.task, view.metric, *usual, view.stride or 0)

    return sorted(found, key=order)


def view_of(row: ResultRow) -> View:
    """The view that a row belongs to."""
    return View(row.split, row.mode, row.stride, row.task, row.metric)


def curves(rows: Iterable[ResultRow], view: View, recipes: Mapping[str, str] | None = None) -> list[Curve]:
    """The curves of one view, by training length (longest first) and scheme.

    Rows of checkpoints from before the end of training are left out, unless the view has no others.

    Args:
        rows: rows of one experiment.
        view: selects among the rows.
        recipes: run -> how its settings differ from the experiment's, in words, from
            `alibi_lm.study.records.recipes`; a run that is not in it is known by its name.
    """
    chosen = [row for row in rows if row.run is not None and view_of(row) == view]
    chosen = [row for row in chosen if step_of(row) is None] or chosen
    texts = text_names(chosen)
    recipes = _names_without_hashes(chosen) | dict(recipes or {})
    found: dict[tuple[str, int, str], Curve] = {}
    for row in chosen:
        assert row.run is not None and row.train_length is not None and row.inference_length is not None
        text = texts[row.corpus] if len(texts) > 1 else ""
        variant = "; ".join(part for part in (variant_of(row, recipes), text) if part)
        key = (row.position, row.train_length, variant)
        curve = found.setdefault(key, Curve(*key, metric=view.metric))
        curve.seeds[row.run] = row.seed
        value = point_of(row)
        if value is None:
            curve.refused[row.inference_length] = row.reason or "no value"
        else:
            curve.losses.setdefault(row.inference_length, {})[row.run] = value
            curve.items[row.inference_length] = items_of(row)
            if "in_reach" in row.extra:
                curve.in_reach[row.inference_length] = row.extra["in_reach"]
            if "beyond" in row.extra:
                curve.beyond.setdefault(row.inference_length, {})[row.run] = row.extra["beyond"]
                curve.items_beyond[row.inference_length] = row.extra["items_beyond"]
    # One point per run, for any cache: what a cache may lose is too little to see.
    for row in rows if view.mode == "nonoverlapping" else []:
        length, loss, cache = row.inference_length, row.loss, row.changes.get("cache")
        if (
            row.run
            and length
            and loss is not None
            and cache != "window"
            and view_of(row) == replace(view, mode="stream")
        ):
            tested = {name: value for name, value in row.changes.items() if name not in CACHE_SETTINGS}
            key = (row.position, row.train_length or 0, variant_of(replace(row, changes=tested), recipes))
            if key in found:
                found[key].streamed.setdefault(length, {})[row.run] = loss
    return sorted(found.values(), key=lambda c: (-c.train_length, c.position, c.variant))


def by_byte(rows: Iterable[ResultRow], view: View) -> list[ResultRow]:
    """The rows of a view in bits per byte, if models with different tokenizers read one text; otherwise none.

    A text that models encode differently has a different hash for each model, but the same number of bytes.
    """
    own = [row for row in rows if replace(view_of(row), metric=view.metric) == view and row.metric == "perplexity"]
    if len({row.corpus for row in own if row.run}) < 2 or len({row.bytes for row in own}) != 1 or not own[0].bytes:
        return []
    return [replace(row, metric="bits_per_byte", value=row.bits_per_byte, corpus="") for row in own]


def point_of(row: ResultRow) -> float | None:
    """A row's point on a curve: mean nats for perplexity, else the value; None if it measured nothing.

    A row with a value and a reason is not a measurement at its length (no window is full there, for example),
    unless the reason is about its perplexity per word.
    """
    about_words = row.words is not None and row.word_perplexity is None and row.metric == "perplexity"
    if row.value is None or (row.reason and not about_words):
        return None
    return row.loss if row.metric == "perplexity" else row.value


def items_of(row: ResultRow) -> int:
    """How many independent units a value averages: tokens, or items. Questions of one item are not independent."""
    return int(row.extra.get("items") or row.n or row.tokens)


def baselines(rows: Sequence[ResultRow], view: View) -> dict[str, float]:
    """Perplexity of each baseline on the view's texts, for example {'unigram': 700.0}.

    A baseline uses no context, so its value holds for every length and mode. With several texts each has its own
    baseline, named after the text.
    """
    texts = text_names(row for row in rows if row.run is not None and view_of(row) == view)
    found = {}
    for row in rows:
        same = row.run is None and (row.split, row.task, row.metric) == (view.split, view.task, view.metric)
        if same and row.value is not None and (row.corpus in texts or not texts):
            name = row.position if len(texts) < 2 else f"{row.position} ({texts[row.corpus]})"
            found[name] = row.value
    return found


def text_names(rows: Iterable[ResultRow]) -> dict[str | None, str]:
    """A name for each text that the rows were scored on, by its hash; equal names are told apart by a number."""
    found: dict[str | None, str] = {}
    for row in sorted(rows, key=lambda r: (str(r.extra.get("corpus_name") or ""), r.corpus or "")):
        if row.corpus not in found:
            name = str(row.extra.get("corpus_name") or "text")
            same = sum(other.partition(" #")[0] == name for other in found.values())
            found[row.corpus] = f"{name} #{same + 1}" if same else name
    return found


def step_of(row: ResultRow) -> int | None:
    """The training step of the checkpoint that a row tested; None for the run's last or best one."""
    named = re.fullmatch(r"step:(\d+)", str(row.changes.get(CHECKPOINT)))
    return int(named[1]) if named else None


def variant_of(row: ResultRow, recipes: Mapping[str, str]) -> str:
    """How a row's curve differs from others of its scheme and training length, in words.

    Without a recipe, runs are seeds of each other only if their names say so; a folder that the user named
    differently is a separate variant, because nothing shows that its settings are the same.
    """
    assert row.run is not None
    tested = ", ".join(
        f"{key.removesuffix('.name').rsplit('.', 1)[-1]}={value}" for key, value in sorted(row.changes.items())
    )
    parts = [recipes[row.run] if row.run in recipes else by_name(row), f"tested with {tested}" if tested else ""]
    return "; ".join(part for part in parts if part)


def _names_without_hashes(rows: Iterable[ResultRow]) -> dict[str, str]:
    """Run -> `other settings` for runs whose name ends in a hash of settings, numbered if there are several."""
    hashes = {row.run: name for row in rows if row.run and _HASH.fullmatch(name := by_name(row))}
    known = sorted(set(hashes.values()))
    numbers = {name: f" #{known.index(name) + 1}" if len(known) > 1 else "" for name in known}
    return {run: f"other settings{numbers[name]}" for run, name in hashes.items()}


def by_name(row: ResultRow) -> str:
    """What a run's name says about its settings; empty if it is the default name in experiments."""
    assert row.run is not None
    name = PurePath(row.run).name
    match = _RUN_NAME.fullmatch(name)
    own = (row.position, str(row.train_length), str(row.seed))
    if match is None or (match["position"], match["length"], match["seed"]) != own:
        return name
    return match["suffix"] or ""


def effective_context(losses: Mapping[int, float]) -> int:
    """The shortest context whose loss is as good as the best one's, up to `NEAR_BEST`.

    Source: Khandelwal et al. (2018), arXiv 1805.04623.

    Args:
        losses: tokens of context -> mean nats; not empty.
    """
    enough = min(losses.values()) * (1 + NEAR_BEST)
    return min(context for context, loss in losses.items() if loss <= enough)
