"""Text from a language model, token by token, in constant or growing memory.

Shape letters: B batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alibi_lm import runtime
from alibi_lm.model.cache import KeyValueCache
from alibi_lm.model.interface import check_ids
from alibi_lm.model.transformer import TransformerLM
from alibi_lm.settings import require, require_at_least

PREFILL = 2048
"""Tokens of a prompt that are processed in one pass."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the distribution."""

    temperature: float = 1.0
    """Logits are divided by it; 0: always the most probable token."""
    top_k: int | None = None
    """Sample from the k most probable tokens only; null: all."""
    top_p: float | None = None
    """Sample only from the most probable tokens that together have this probability (Holtzman et al. 2020, arXiv
    1904.09751); null: all."""

    def __post_init__(self) -> None:
        require(
            0 <= self.temperature < float("inf"),
            f"temperature = {self.temperature}. Use 0 (always the most probable token) or more.",
        )
        require_at_least("top_k", self.top_k, 1)
        require(self.top_p is None or 0 < self.top_p <= 1, f"top_p = {self.top_p}. Use a number above 0, up to 1.")

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """Draw a token: (V,) float32 on any device -> its id."""
        if self.temperature == 0:
            return int(logits.argmax())
        # Subtract the largest logit first, so that a tiny temperature does not give infinities.
        scores = (logits.double() - logits.max()).cpu() / self.temperature
        if self.top_k is not None and self.top_k < len(scores):
            scores[scores < scores.topk(self.top_k).values[-1]] = -torch.inf
        probabilities = scores.softmax(-1)
        if self.top_p is not None:
            ordered, order = probabilities.sort(descending=True, stable=True)
            beyond = ordered.cumsum(0) - ordered >= self.top_p  # the most probable token always stays
            probabilities[order[beyond]] = 0
        return int(torch.multinomial(probabilities, 1, generator=generator))


def generate(
    model: TransformerLM,
    ids: Sequence[int] | Tensor,
    max_tokens: int,
    *,
    cache: KeyValueCache | None = None,
    sampling: Sampling | None = None,
    seed: int = 1,
) -> Iterator[int]:
    """Generate the tokens that continue a prompt, one by one.

    Args:
        model: the language model, in evaluation mode.
        ids: (T,) the prompt, at least one token.
        max_tokens: how many tokens to generate.
        cache: an empty one from `streaming.open_cache`, which says afterwards what was kept and lost; None: all
            keys are kept.
        sampling: how tokens are chosen; None: from the model's distribution.
        seed: seed of the random choice; the same seed gives the same tokens.

    Returns:
        Token ids, each generated when it is requested.

    Raises:
        ValueError: an empty prompt, ids outside the vocabulary, or more tokens than the scheme has positions;
            before the first token.
    """
    caches = None if cache is None else [cache]
    steps = generate_batch(model, [ids], max_tokens, caches=caches, sampling=sampling, seed=seed)
    return (token for (token,) in steps)


def generate_batch(
    model: TransformerLM,
    prompts: Sequence[Sequence[int] | Tensor],
    max_tokens: int,
    *,
    caches: Sequence[KeyValueCache] | None = None,
    sampling: Sampling | None = None,
    seed: int = 1,
) -> Iterator[list[int]]:
    """Continue several prompts of any lengths at once; each gets the tokens that it would get alone.

    Each prompt has its own cache and positions, so nothing is padded. Row n draws with seed + n.

    Args:
        model: the language model, in evaluation mode.
        prompts: B prompts, see `generate`.
        max_tokens: how many tokens to generate for each.
        caches: one per prompt; None: all keys are kept.
        sampling: how tokens are chosen.
        seed: seed of the random choice.

    Returns:
        B token ids at a time, generated when they are requested.

    Raises:
        ValueError: see `generate`.
    """
    require_at_least("max_tokens", max_tokens, 1)
    require(bool(prompts), "There is no prompt. Give at least one.")
    rows = [torch.as_tensor(ids, dtype=torch.int64).view(1, -1) for ids in prompts]
    limit = model.max_length
    for row in rows:
        require(row.numel() > 0, "The prompt is empty. Give at least one token.")
        check_ids(model.vocab_size, row)
        needed = row.shape[1] + max_tokens - 1
        require(
            limit is None or needed <= limit,
            f"A prompt of {row.shape[1]} tokens and max_tokens = {max_tokens} need {needed} positions; "
            f"position={model.position.name} has {limit}. Use a shorter prompt or fewer tokens.",
        )
    held = list(caches) if caches is not None else [KeyValueCache() for _ in rows]
    require(len(held) == len(rows), f"{len(held)} caches for {len(rows)} prompts. Give one for each.")
    generators = [torch.Generator().manual_seed(seed + n) for n in range(len(rows))]
    sampling = sampling or Sampling()
    return _steps(model, rows, held, max_tokens, sampling, generators)


def _steps(
    model: TransformerLM,
    rows: list[Tensor],
    caches: list[KeyValueCache],
    max_tokens: int,
    sampling: Sampling,
    generators: list[torch.Generator],
) -> Iterator[list[int]]:
    with torch.inference_mode():
        logits = torch.cat([prefill(model, row, cache) for row, cache in zip(rows, caches, strict=True)])
    for step in range(max_tokens):
        tokens = [sampling.choose(*pair) for pair in zip(logits, generators, strict=True)]
        yield tokens
        if step + 1 < max_tokens:
            ids = torch.tensor(tokens, device=model.device)[:, None]
            with torch.inference_mode(), runtime.autocast(model.device, model.precision):
                logits = model(ids, last=True, cache=caches if len(caches) > 1 else caches[0])[:, 0]


def prefill(model: TransformerLM, row: Tensor, cache: KeyValueCache) -> Tensor:
    """Put a prompt (1, T) into a cache, in pieces; returns logits of the token after it, (1, V)."""
    with runtime.autocast(model.device, model.precision):
        *before, last = row.to(model.device).split(PREFILL, dim=1)
        for piece in before:
            model.hidden(piece, cache=cache)
        return model(last, last=True, cache=cache)[:, 0]
