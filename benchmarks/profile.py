"""Where the time of a training step goes, by part of the model."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from benchmarks.report import grid_markdown
from benchmarks.subjects import Subject, Task, words

PARTS: Mapping[str, str] = {
    "loss": r"LinearCrossEntropy|nll_loss|log_softmax|logsumexp",
    "optimizer, clipping": r"Optimizer\.|_fused_adamw|_foreach",
    "attention": r"scaled_dot_product|native_attention|_Attention|softmax|bmm|flash_attention",
    "linear layers": r"addmm|aten::mm\b|AddmmBackward|MmBackward",
}
"""Name of a part -> operators that belong to it, including all that they call. The first match counts."""
REST = "norms, activations, embeddings, copies"


def profile_step(subject: Subject, task: Task) -> dict[str, float]:
    """Share of each part in one training step's time on the CPU, largest first; they add up to 1."""
    # Otherwise the profiler's library reports each start and stop on standard error.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from torch.profiler import ProfilerActivity, profile

    ids = words(task.batch, task.length + 1, subject.setup.vocab_size).to(subject.setup.device)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    subject.module.to(subject.setup.device)
    subject.train_step(inputs, targets)  # allocates the optimizer's state
    # Without acc_events some versions of torch warn, and the caller may turn warnings into errors.
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as found:
        subject.train_step(inputs, targets)
    microseconds: dict[str, float] = {}
    for event in found.events():
        part = _part(event)
        microseconds[part] = microseconds.get(part, 0.0) + event.self_cpu_time_total
    subject.release()
    total = sum(microseconds.values())
    return dict(sorted(((part, us / total) for part, us in microseconds.items()), key=lambda item: -item[1]))


def _part(event: Any) -> str:
    """The part that an operator, or the outermost one that called it, belongs to."""
    chain = []
    while event is not None:
        chain.append(str(event.name))
        event = event.cpu_parent
    for name in reversed(chain):
        for part, pattern in PARTS.items():
            if re.search(pattern, name):
                return part
    return REST


def profile_table(shares: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown, one column per subject."""
    parts = dict.fromkeys(part for share in shares.values() for part in share)
    body = {part: {name: f"{share.get(part, 0):.0%}" for name, share in shares.items()} for part in parts}
    return grid_markdown("part of the step", list(shares), body, list(shares))
