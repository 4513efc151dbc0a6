"""The model's training loss through torch's compiler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from alibi_lm.model.transformer import TransformerLM


class CompiledNats:
    """`model.nats` with the layers through `torch.compile`: the same parameters, the same values to rounding.

    Compilation happens at the first call with each shape. The model itself is unchanged, so that an evaluation at
    other lengths compiles nothing. The loss is not compiled: its chunks stay in the cache and are overwritten in
    place, which is faster than compiled code for logits, softmax and loss.

    Args:
        model: the language model.
    """

    def __init__(self, model: TransformerLM) -> None:
        self.model = model
        self.hidden = torch.compile(model.hidden, dynamic=False)

    def __call__(self, *batch: Any, **options: Any) -> Tensor:
        """Minus the natural logarithm of each target's probability; the arguments are those of `model.nats`.

        Raises:
            ValueError: compilation failed, most often because there is no C++ compiler.
        """
        try:
            return self.model.nats(*batch, hidden=self.hidden, **options)
        except Exception as error:
            # torch's compiler raises its own exception classes, whose names differ between versions.
            modules = [c.__module__ for c in type(error).__mro__]
            if not any(m.startswith(("torch._inductor", "torch._dynamo")) for m in modules):
                raise
            reason = (str(error).strip() or "no reason given").splitlines()[0]
            advice = "It needs a C++ compiler (g++ or clang++, named by CXX if it is not g++). Install one"
            limits = ("temporarily unavailable", "start new thread", "allocate memory")
            if any(limit in str(error) for limit in limits):
                advice = "The system let it start no more processes or threads: raise that limit (ulimit -u)"
            raise ValueError(
                f"compile = true, but torch.compile failed here: {type(error).__name__}: {reason}\n"
                f"{advice}, or use compile=false."
            ) from error
