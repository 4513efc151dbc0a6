"""Tasks: what a model is asked to predict, and how well it did."""

from alibi_lm.tasks.base import TaskConfig
from alibi_lm.tasks.board import BOARD
from alibi_lm.tasks.needle import NeedleConfig
from alibi_lm.tasks.recall import MQAR, Induction, MQARExtrapolate

_KINDS: tuple[type, ...] = (TaskConfig, *BOARD, MQAR, MQARExtrapolate, Induction, NeedleConfig)
TASKS: dict[str, type] = {kind().name: kind for kind in _KINDS}
"""What a run can be trained on, by the name of its entry in the config group `task`."""
