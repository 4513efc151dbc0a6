"""The training step's forward and backward pass through `torch.compile`.

The layers are compiled, the loss is not: its chunks stay in the cache and work in place, which is faster than
what a compiler makes of scores, softmax and loss.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from alibi_lm.model.transformer import TransformerLM


class CompiledNats:
    """`model.nats`, compiled: the same parameters, the same values to rounding.

    Compilation happens at the first call with each shape. The model itself stays as it is, so that an evaluation
    at other lengths compiles nothing.

    Args:
        model: the language model.
    """

    def __init__(self, model: TransformerLM) -> None:
        self.model = model
        if model.backend.prepares_outside:
            # Here, because the decorator loads the whole of the compiler.
            setattr(model.backend, "prepare", torch.compiler.disable(model.backend.prepare))  # noqa: B010
        self.layers = torch.compile(model, dynamic=False)

    def __call__(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        """Minus the natural logarithm of each target's probability: (B, T), (B, T) int64 -> (B, T).

        Raises:
            ValueError: compilation failed, most often because there is no C++ compiler.
        """
        try:
            hidden = cast(Tensor, self.layers(input_ids))
        except Exception as error:
            if not _is_of_the_compiler(error):
                raise
            raise ValueError(
                f"compile = true, but torch.compile failed here: {_first_line(error)}\n"
                "It needs a C++ compiler (g++ or clang++, named by CXX if it is not g++). Install one, or use "
                "compile=false."
            ) from error
        return self.model.vocabulary.nats(hidden.flatten(0, 1), target_ids.flatten()).view_as(target_ids)


def _is_of_the_compiler(error: BaseException) -> bool:
    """Whether an exception comes from torch's compiler (its classes moved between versions)."""
    return any(c.__module__.startswith(("torch._inductor", "torch._dynamo")) for c in type(error).__mro__)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no reason given'}"
