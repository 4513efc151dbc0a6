"""What the paper says, as statements that results can confirm or refute.

A claim compares two sides, in perplexity of the left over that of the right, at every training length L at which
both were run; of a task it compares accuracies, left minus right. With one side it holds a value against a bound:
an accuracy, or a number of a view. Claims about speed are decided by the benchmark. A claim of several `parts`
holds where all of them do.

To add a claim, add it to a group of CLAIMS, or a group. Claims about a task name it in both sides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

NEAR = 0.025
"""Share by which a length may miss the one asked for: the paper measured 1,012 and 2,024, not 1,024 and 2,048."""


@dataclass(frozen=True)
class Side:
    """Which runs, and at which inference lengths; lengths are multiples of L."""

    position: str
    at: float = 1.0
    which: Literal["at", "every beyond", "longest from"] = "at"
    """The length `at` L itself, every longer one, or the longest one of at least that."""
    train: float = 1.0
    stride: int | None = None
    """Of sliding windows; None: nonoverlapping ones. For stride 1 analyse.py view=fixed serves too."""
    where: dict[str, Any] = field(default_factory=dict)
    """Settings of the run's config.yaml that must have these values."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Settings changed for the test, such as {"position.scaling": "yarn"}."""
    stage: float = 1.0
    """Share of the training after which the run was tested, by a checkpoint that was kept."""
    task: str = "text"
    """Other than text: its accuracy."""
    split: str = "validation"
    far: bool = False
    """Of needles: those alone that stand further than L from the question."""
    view: str = ""
    """A view of scripts/analyse.py that has the `number`; empty: result rows."""
    number: str = ""
    """By its name in the view's points; `<name>/L`: as a share of the training length."""

    @property
    def metric(self) -> str:
        """What is compared."""
        return "number" if self.number else "perplexity" if self.task == "text" else "accuracy"

    def lengths(self, train_length: int, known: Iterable[int]) -> list[int]:
        """The inference lengths meant, among those measured; empty where none fits.

        Args:
            train_length: the value of L.
            known: measured inference lengths.
        """
        measured, wanted = sorted(set(known)), self.at * train_length
        if self.which == "every beyond":
            return [n for n in measured if n > wanted]
        if self.which == "longest from":
            return [n for n in measured if n >= wanted * (1 - NEAR)][-1:]
        best = min(measured, key=lambda n: (abs(math.log(n / wanted)), n), default=None)
        return [best] if best is not None and abs(best / wanted - 1) <= NEAR else []

    @property
    def words(self) -> str:
        """The lengths, for messages: `2L`, `every length beyond L`."""
        times = f"{self.at:g}L" if self.at != 1 else "L"
        return {"at": times, "every beyond": f"every length beyond {times}"}.get(self.which, f"{times} or more")


Relation = Literal["below", "above", "within"]


@dataclass(frozen=True)
class Claim:
    """One statement and how to check it."""

    id: str
    statement: str
    source: str
    left: Side | None = None
    right: Side | None = None
    relation: Relation = "below"
    """Left over right is below or above `bound`, or within 1 / bound and bound."""
    bound: float = 1.0
    """Of a ratio; of accuracies the bound of left minus right, and of one side that of its value."""
    from_L: bool = False
    """Compare what each side has lost from L on: its perplexity over its own at L."""
    equal_time: bool = False
    """Compare the sides after equal training time, by the benchmark's speeds and the checkpoints kept."""
    train_lengths: Sequence[int] = ()
    """Values of L; empty: all training lengths in the results."""
    min_lengths: int = 1
    """Training lengths without which a claim about all of them is not confirmed."""
    measure: Literal["train_ratio", "eval_ratio"] | None = None
    """A speed of the benchmark, compared at equal length, in place of perplexity."""
    parts: Sequence[Claim] = ()
    """What it is made of, in place of sides: it holds where all of these do."""
    min_parts: int = 0
    """Parts without which nothing is said; 0: all of them."""
    given: bool = False
    """Of a part: the whole says nothing of runs for which it does not hold."""

    def __post_init__(self) -> None:
        assert self.relation in ("below", "above", "within")
        assert (self.left is None) == bool(self.parts)
        assert self.right is not None or self.parts or (self.left and self.left.metric != "perplexity")

    @property
    def seeds_needed(self) -> int:
        """Fewest seeds that settle it; one is enough only for the perplexity of runs compared with themselves."""
        if self.left is None or self.left.metric != "perplexity" or self.right is None:
            return 1 if self.left and self.left.view == "decomposition" else 2
        sides = [(side.position, side.train, side.where, side.stage) for side in (self.left, self.right)]
        return 1 if sides[0] == sides[1] else 2


def beyond(
    id: str,
    position: str,
    at: float,
    relation: Relation,
    statement: str,
    source: str,
    bound: float = 1.0,
    **side: Any,
) -> Claim:
    """A claim about a scheme at `at` times L against itself at L; `side` holds further settings of both sides."""
    which = side.pop("which", "at")
    left, right = Side(position, at, which, **side), Side(position, **side)
    return Claim(id, statement, source, left, right, relation, bound)


def better(id: str, left: Side, right: str, statement: str, source: str, **claim: Any) -> Claim:
    """A claim that `left` has a lower perplexity than the scheme `right` at and trained at L."""
    return Claim(id, statement, source, left, Side(right), "below", **claim)


def _part(name: str) -> Side:
    """A part of the change of ALiBi's loss from L to every longer length."""
    return Side("alibi", which="every beyond", view="decomposition", number=name)


def looks(
    id: str, number: str, relation: Relation, bound: float, statement: str, source: str, **side: Any
) -> Claim:
    """A claim about a mean over ALiBi's heads (view=attention) at L, or where `side` says."""
    return Claim(
        id, statement, source, Side("alibi", view="attention", number=number, **side), None, relation, bound
    )


def needles(position: str, at: float = 1.0, **side: Any) -> Side:
    """The accuracy of a language model that was trained with needles in its text."""
    return Side(position, at, task="needle", **side)


def _board(position: str, task: str) -> Side:
    """The accuracy on a task of the board at every length beyond L."""
    return Side(position, which="every beyond", task=task, split="test")


def _far_bam(scale: str) -> Side:
    """The accuracy of bam with a query scale on far needles, at the longest length."""
    return needles("bam", 4, which="longest from", far=True, where={"query_scale.name": scale})


HALF = {"position.half_precision": True}
BOARD = (
    "bin_majority", "majority", "interleaved_majority", "unique_copy", "repeat_copy", "sort", "parity", "addition",
    "mqar", "mqar_extrapolate", "induction",
)  # fmt: skip
"""Tasks by their names in configs."""

every_beyond = partial(beyond, which="every beyond")
at_longest = partial(beyond, which="longest from")

CLAIMS: dict[str, list[Claim]] = {
    # The shape of the paper's Figure 1: each scheme against its own value at the training length.
    "Extrapolation (Figure 1, Tables 2-4)": [
        beyond(
            "sinusoidal_worse_at_2L", "sinusoidal", 2, "above",
            "Sinusoidal positions are worse at 2L than at L.",
            "Tables 2-4 (x2.17 at L=512, x2.64 at L=1024)",
        ),
        at_longest(
            "sinusoidal_breaks_at_8L", "sinusoidal", 4, "above",
            "Sinusoidal positions are at least twice as bad at the longest length, 4L or more, as at L.",
            "Tables 2-4", 2.0,
        ),
        beyond(
            "rotary_worse_at_2L", "rotary", 2, "above",
            "Rotary positions are worse at 2L than at L.",
            "Tables 2-4 (x1.06 at L=512, x1.61 at L=1024)",
        ),
        Claim(
            "rotary_holds_longer_than_sinusoidal", "At 2L rotary positions are better than sinusoidal ones.",
            "Section 2.2, Tables 2-4", Side("rotary", 2), Side("sinusoidal", 2),
        ),
        beyond(
            "t5_no_worse_at_2L", "t5", 2, "below",
            "The T5 bias is no worse at 2L than at L.",
            "Tables 2-4 (x0.956 at L=512, x0.976 at L=1024)",
        ),
        at_longest(
            "t5_worse_at_longest", "t5", 4, "above",
            "The T5 bias is worse at the longest length, 4L or more, than at L.", "Tables 2-4",
        ),
        beyond(
            "alibi_gains_at_2L", "alibi", 2, "below",
            "ALiBi is better at 2L than at L.", "Tables 2-5 (x0.949 at L=512, x0.967 at L=1024)",
        ),
        every_beyond(
            "alibi_never_worse", "alibi", 1, "below",
            "ALiBi is nowhere beyond L worse than at L by more than 1%.", "Tables 2-5", 1.01,
        ),
        Claim(
            "alibi_best_at_2L", "At 2L ALiBi is better than sinusoidal positions.",
            "Figure 1", Side("alibi", 2), Side("sinusoidal", 2),
        ),
    ],
    # Schemes against each other at one inference length. Seeds differ by 1 to 2 per cent here: several are needed.
    "Trained at equal and at half length (Table 5)": [
        better(
            "alibi_beats_sinusoidal_at_L", Side("alibi"), "sinusoidal",
            "At equal training length L of 256 or more ALiBi is better than sinusoidal positions.", "Table 5",
            train_lengths=(256, 512, 1024, 1536, 2048, 3072),
        ),
        better(
            "alibi_beats_rotary_at_L", Side("alibi"), "rotary",
            "At equal training length ALiBi is better than rotary positions.", "Table 5",
        ),
        better(
            "alibi_half_length_beats_sinusoidal", Side("alibi", train=0.5), "sinusoidal",
            "ALiBi trained at L/2 and tested at L beats sinusoidal positions trained at L, for L of 512 or more.",
            "Table 5", train_lengths=(512, 1024, 2048, 3072),
        ),
        better(
            "alibi_sixth_length_beats_sinusoidal", Side("alibi", train=1 / 6), "sinusoidal",
            "ALiBi trained at 512 and tested at 3072 beats sinusoidal positions trained at 3072.",
            "Abstract of section 4.1, Table 5 (18.40 against 18.67)", train_lengths=(3072,),
        ),
    ],
    # Appendix B: nonoverlapping windows gain from length because fewer tokens have a short context.
    "What the gain is made of (Appendix B, Tables 5 and 13-15)": [
        beyond(
            "alibi_gains_without_overlap", "alibi", 2, "below",
            "With nonoverlapping windows ALiBi gains at least 1% from L to 2L.", "Tables 2-5", 0.99,
        ),
        beyond(
            "alibi_gain_vanishes_when_sliding", "alibi", 2, "above",
            "Under stride-1 sliding ALiBi gains less than 1% from L to 2L.", "Table 15", 0.99, stride=1,
        ),
        every_beyond(
            "alibi_flat_when_sliding", "alibi", 1, "within",
            "Under stride-1 sliding ALiBi stays within 5% of its value at L at all lengths.", "Table 15", 1.05,
            stride=1,
        ),
        beyond(
            "sinusoidal_breaks_when_sliding", "sinusoidal", 2, "above",
            "Under stride-1 sliding sinusoidal positions at 2L are more than twice as bad as at L.",
            "Table 13", 2.0, stride=1,
        ),
        Claim(
            "alibi_gains_by_early_tokens",
            "That fewer targets have a short context lowers ALiBi's loss beyond L.",
            "Appendix B", _part("early_tokens"),
        ),
        Claim(
            "alibi_uses_no_positions_beyond",
            "Positions beyond L, with no key further than L, change ALiBi's perplexity by less than 1%.",
            "Appendix B", _part("positions_beyond"), None, "within", 1.01,
        ),
        Claim(
            "alibi_uses_no_keys_beyond",
            "Keys further than L change ALiBi's perplexity by less than 1%.",
            "Appendix B", _part("keys_beyond"), None, "within", 1.01,
        ),
    ],
    # Stronger than the paper's numbers: its own tables do not bear these out, so a check that lets them pass there
    # checks nothing.
    "Claims known not to hold in the paper": [
        better(
            "alibi_beats_sinusoidal_at_64_and_128", Side("alibi"), "sinusoidal",
            "ALiBi is better than sinusoidal positions at equal training lengths of 64 and 128 too.",
            "Table 5 says otherwise (28.46 against 28.03, 23.98 against 23.81)", train_lengths=(64, 128),
        ),
        better(
            "alibi_beats_sinusoidal_at_every_L", Side("alibi"), "sinusoidal",
            "ALiBi is better than sinusoidal positions at every equal training length.",
            "Table 5 has it from 256 on only", min_lengths=3,
        ),
        better(
            "alibi_half_length_beats_sinusoidal_at_every_L", Side("alibi", train=0.5), "sinusoidal",
            "ALiBi trained at L/2 and tested at L beats sinusoidal positions trained at L, for every L.",
            "Table 5 has it from 512 on only", min_lengths=3,
        ),
        better(
            "alibi_beats_t5_at_512", Side("alibi"), "t5",
            "ALiBi is better than the T5 bias at L = 512.",
            "Table 5 says otherwise (19.73 against 19.65)", train_lengths=(512,),
        ),
        every_beyond(
            "t5_flat_under_sliding", "t5", 1, "within",
            "Under stride-1 sliding the T5 bias stays within 5% of its value at L.",
            "Appendix B says so; its Table 14 says otherwise (17.92 to 30.77)", 1.05, stride=1,
        ),
    ],
    # Claims about cost and slopes, and those that result rows cannot decide.
    "Cost, slopes and what needs other measurements": [
        Claim(
            "alibi_trains_as_fast", "ALiBi trains at most 1% slower than sinusoidal positions at equal length.",
            "Section 3, Table 1", Side("alibi"), Side("sinusoidal"), "above", 0.99, measure="train_ratio",
        ),
        Claim(
            "alibi_evaluates_as_fast",
            "ALiBi evaluates at most 3% slower than sinusoidal positions at equal length.",
            "Section 3, Table 1", Side("alibi"), Side("sinusoidal"), "above", 0.97, measure="eval_ratio",
        ),
        Claim(
            "learned_slopes_extrapolate_worse",
            "With learned slopes ALiBi is worse at 4L than with fixed ones.", "Section 3",
            Side("alibi", 4, where={"position.learned_slopes": True}),
            Side("alibi", 4, where={"position.learned_slopes": False}), "above",
        ),
        Claim(
            "equal_time", "At equal training time ALiBi at L/2, tested at L, beats sinusoidal positions at L.",
            "Table 11", Side("alibi", train=0.5), Side("sinusoidal"), equal_time=True,
        ),
        Claim(
            "half_precision_form",
            "The authors' half-precision form of the bias changes ALiBi's perplexity by less than 0.1%, at L and "
            "beyond.", "the authors' code, which trains in it", Side("alibi", 0.99, "every beyond", changes=HALF),
            Side("alibi", 0.99, "every beyond"), "within", 1.001,
        ),
        Claim(
            "longer_training_extrapolates_less",
            "The longer ALiBi is trained, the less far it extrapolates: from L to 8L it loses more, or gains "
            "less, at the end of training than after a third of it.",
            "later work (Cerebras, arXiv 2310.13017; Kazemnejad et al. 2023)",
            Side("alibi", 8), Side("alibi", 8, stage=1 / 3), "above", from_L=True,
        ),
    ],
    # Perplexity can stay flat while a model no longer uses what it reads. Accuracies count all seeds.
    "Retrieval and tasks": [
        Claim(
            "retrieval_at_distance",
            "ALiBi hardly retrieves a token from beyond L, although its perplexity is flat: where it finds "
            "more than half of the needles at L, it finds at every longer length fewer than 15% of those further "
            "than L from the question, and its perplexity stays within 5% of that at L.",
            "later work (Kazemnejad et al. 2023; DroPE, arXiv 2512.12167)",
            parts=[
                Claim("needles at L", "", "", needles("alibi"), None, "above", 0.5, given=True),
                Claim(
                    "far needles", "", "", needles("alibi", which="every beyond", far=True), None, "below", 0.15
                ),
                Claim(
                    "perplexity", "", "", Side("alibi", which="every beyond", where={"task.name": "needle"}),
                    Side("alibi", where={"task.name": "needle"}), "within", 1.05,
                ),
            ],
        ),
        Claim(
            "none_beats_alibi_on_tasks",
            "On each task of the board that was run, three or more, a model without positions has a higher "
            "accuracy than ALiBi at every length beyond L.",
            "Kazemnejad et al. 2023, arXiv 2305.19466 (mean over tasks, and better than all schemes)",
            parts=[
                Claim(task, "", "", _board("none", task), _board("alibi", task), "above", 0.0) for task in BOARD
            ],
            min_parts=3,
        ),
        Claim(
            "ssmax_retrieves_far",
            "Adding SSMax lets a trained exponent (bam) retrieve far beyond L: at the longest length, 4L or more, "
            "it finds more than half of the needles further than L from the question, and more than without.",
            "Bianchessi et al. 2025, arXiv 2505.22842",
            parts=[
                Claim("with SSMax", "", "", _far_bam("ssmax"), None, "above", 0.5),
                Claim("with less without", "", "", _far_bam("ssmax"), _far_bam("none"), "above", 0.0),
            ],
        ),
    ],
    # Statements that are often made of ALiBi's attention and seldom measured.
    "Where ALiBi looks (view=attention, repeat, effective_context)": [
        looks(
            "focuses_locally", "near", "above", 0.5,
            "ALiBi focuses locally: at L its heads give more than half of their weight to the last L/8 keys (on "
            "average over heads and queries of the second half; uniform weights would give about a sixth).",
            "common description of ALiBi",
        ),
        looks(
            "weights_fall_with_distance", "falling", "above", 0.9,
            "ALiBi's weights fall with distance: at L, of all steps from one range of distances to the next "
            "further one, the mean weight of a key in a head falls at more than 90%.",
            "common description of ALiBi",
        ),
        Claim(
            "looks_the_same_at_every_length",
            "ALiBi looks the same at every length: the mean distance of what its heads look at stays within 10% "
            "of that at L.", "common description of ALiBi",
            Side("alibi", which="every beyond", view="attention", number="distance"),
            Side("alibi", view="attention", number="distance"), "within", 1.1,
        ),
        Claim(
            "keeps_long_range_dependencies",
            "ALiBi keeps important long-range dependencies: a segment that was read once, further than L before, "
            "costs it at least 0.05 nats per token less.", "common description of ALiBi",
            Side("alibi", which="every beyond", view="repeat", number="nats"), None, "above", 0.05,
        ),
        Claim(
            "uses_no_more_than_L",
            "ALiBi acts as windowed attention: in the longest context that was measured, 99% of the "
            "gradient of its loss goes to the last L tokens.",
            "Chi et al. 2023, arXiv 2212.10356",
            Side("alibi", view="effective_context", number="receptive_field/L"), None, "below", 1.0,
        ),
    ],
}  # fmt: skip
"""Title of a group -> its claims."""
