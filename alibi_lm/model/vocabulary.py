"""Token embedding and output distribution with one vector per word, tied or untied.

Shape letters: B batch, T tokens, N = B T, D model dim, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alibi_lm.model.cross_entropy import linear_cross_entropy


class Vocabulary(nn.Module):
    """A table of word vectors, and the softmax over their scores.

    Args:
        vocab_size: V.
        model_dim: D.
        tied: the output scores use the embedding's table (Press & Wolf 2017, arXiv 1608.05859).
    """

    def __init__(self, vocab_size: int, model_dim: int, tied: bool) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab_size, model_dim))
        self.output = None if tied else nn.Parameter(torch.empty(vocab_size, model_dim))

    def initialise(self) -> None:
        """Normal, standard deviation D^-0.5, so that sqrt(D) times a row has entries of size one."""
        for table in self.parameters():
            nn.init.normal_(table, std=table.shape[1] ** -0.5)

    def embed(self, ids: Tensor) -> Tensor:
        """Word vectors, not scaled.

        Args:
            ids: (B, T) int64.

        Returns:
            (B, T, D).
        """
        return F.embedding(ids, self.embedding)

    @property
    def output_table(self) -> Tensor:
        """The vectors whose products with a hidden state are its scores, (V, D)."""
        return self.embedding if self.output is None else self.output

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores before the softmax: (N, D) -> (N, V), float32 or better."""
        scores = F.linear(hidden, self.output_table)
        return scores.float() if scores.dtype in (torch.bfloat16, torch.float16) else scores

    def nats(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Minus the natural logarithm of each target's probability, chunk by chunk.

        Args:
            hidden: (N, D).
            targets: (N,) int64.

        Returns:
            (N,) float32 (float64 in a float64 model).
        """
        return linear_cross_entropy(hidden, self.output_table, targets)

    def log_probs(self, hidden: Tensor) -> Tensor:
        """The whole distribution: (N, D) -> (N, V) natural logarithms."""
        return self.logits(hidden).log_softmax(dim=-1)
