"""Word vectors and the distribution over words: one vector per word, or bands of word frequency.

`Vocabulary` has one table, tied or untied (Press & Wolf 2017, arXiv 1608.05859). `AdaptiveVocabulary` follows
Baevski & Auli 2019, "Adaptive Input Representations", arXiv 1809.10853, sections 3-4; the softmax is Grave et al.
2017, arXiv 1609.04309. Tying and initialisation as in fairseq (modules/adaptive_input.py and
modules/adaptive_softmax.py), which the ALiBi paper's WikiText-103 models use.

Words are numbered by falling frequency and split into bands at the cutoffs c_1 < c_2 < ... Band i has vectors
with D_i = D / factor^i dimensions: a table E_i (words of the band, D_i) and a projection P_i (D, D_i).

    input:  embed(w) = P_i E_i[w - c_i]                     w in band i; c_0 = 0
    output: head = log_softmax([E_0 h, C h])                the words of band 0, and a cluster for each tail
            log p(w) = head[w]                              w in band 0
            log p(w) = head[cluster i] + log_softmax(E_i P_i^T h)[w - c_i]          w in tail i

Tied: every E_i, and the P_i of the tails. P_0 serves only the input, the cluster vectors C only the output.
There are no biases.

Differs from the authors' code: their training loss leaves out the tail term of the second word of each tail
(`ignore_index=1`, meant for the padding token, is applied inside each band). Here the loss is always the
negative log-likelihood, the same quantity that evaluation reports.

Shape letters: B batch, T tokens, N = B T, D model dim, V vocabulary.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alibi_lm.model.cross_entropy import chunk_rows, first_choices, linear_cross_entropy, scores


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
        """Word vectors, not scaled: (B, T) int64 -> (B, T, D)."""
        return F.embedding(ids, self.embedding)

    @property
    def output_table(self) -> Tensor:
        """The vectors whose products with a hidden state are its logits, (V, D)."""
        return self.embedding if self.output is None else self.output

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits: (..., D) -> (..., V), float32 or better."""
        return scores(hidden, self.output_table)

    def nats(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Minus the natural logarithm of each target's probability, chunk by chunk.

        (N, D), (N,) int64 -> (N,) float32 (float64 in a float64 model).
        """
        return linear_cross_entropy(hidden, self.output_table, targets)

    def first_choices(self, hidden: Tensor) -> Tensor:
        """The most probable word of each row, chunk by chunk: (N, D) -> (N,) int64."""
        return first_choices(hidden, self.output_table)


class AdaptiveVocabulary(nn.Module):
    """Word vectors whose width falls with the word's frequency, and the softmax over them.

    Args:
        vocab_size: V.
        model_dim: D.
        cutoffs: first word of each tail, ascending, in (0, V).
        factor: each band's vectors are this many times narrower than those of the band before (rounded down).
        dropout: of the softmax's input, and again after each tail's projection.

    Raises:
        ValueError: cutoffs that leave a band empty, or a factor that leaves a band without dimensions.
    """

    def __init__(self, vocab_size: int, model_dim: int, cutoffs: list[int], factor: float, dropout: float) -> None:
        super().__init__()
        borders = [0, *cutoffs, vocab_size]
        if not cutoffs or any(low >= high for low, high in pairwise(borders)):
            raise ValueError(
                f"model.adaptive_cutoffs = {list(cutoffs)} with a vocabulary of {vocab_size}. Use word "
                f"counts that grow, all between 1 and {vocab_size - 1}; or [] for a plain softmax."
            )
        dims = [int(model_dim // factor**band) for band in range(len(borders) - 1)]
        if dims[-1] < 1:
            raise ValueError(
                f"model.adaptive_factor = {factor} leaves the vectors of band {len(dims)} without "
                f"dimensions: model.model_dim = {model_dim}. Use a smaller factor or fewer cutoffs."
            )
        self.vocab_size = vocab_size
        self.bands = tuple(pairwise(borders))
        self.embeddings = nn.ParameterList(
            torch.empty(high - low, dim) for (low, high), dim in zip(self.bands, dims, strict=True)
        )
        self.projections = nn.ParameterList(torch.empty(model_dim, dim) for dim in dims)
        self.clusters = nn.Parameter(torch.empty(len(cutoffs), model_dim))
        self.dropout = nn.Dropout(dropout)

    def initialise(self) -> None:
        """The authors' distributions: tables normal with std D_i^-0.5, everything else Xavier uniform.

        Word 1 of *every* band starts at zero. It is the padding token in the first band and, by a quirk of the
        authors' code, a real word in each tail.
        """
        for table in self.embeddings:
            nn.init.normal_(table, std=table.shape[1] ** -0.5)
            if len(table) > 1:
                with torch.no_grad():
                    table[1].zero_()
        for weight in (*self.projections, self.clusters):
            nn.init.xavier_uniform_(weight)

    def embed(self, ids: Tensor) -> Tensor:
        """Word vectors, not scaled: (B, T) int64 -> (B, T, D)."""
        # Every band processes every token, and words of other bands contribute zeros. This is less than a percent
        # of the model's work, and nothing has to be read from the device.
        total: Tensor | None = None
        for (low, high), table, projection in zip(self.bands, self.embeddings, self.projections, strict=True):
            inside = (ids >= low) & (ids < high)
            vectors = F.embedding((ids - low).clamp(0, high - low - 1), table)
            part = F.linear(vectors * inside[..., None], projection)
            total = part if total is None else total + part
        assert total is not None
        return total

    def nats(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Minus the natural logarithm of each target's probability.

        (N, D), (N,) int64 -> (N,) float32 (float64 in a float64 model). A tail's softmax is computed only for the
        targets in that tail; this needs one read of the number of targets per band from the device.
        """
        hidden = self.dropout(hidden)
        head_size = self.bands[0][1]
        band = torch.zeros_like(targets)
        for low, _ in self.bands[1:]:
            band += targets >= low
        head_targets = torch.where(band == 0, targets, head_size + band - 1)
        nats = linear_cross_entropy(hidden, self._head_table(), head_targets)

        # Rows are sorted by band, so that a tail is a slice. An empty slice still gives its weights a gradient
        # (of zeros), so that all processes and all steps have the same set of gradients.
        order = torch.argsort(band, stable=True)
        sizes = torch.bincount(band, minlength=len(self.bands)).tolist()
        for tail, rows in enumerate(order.split(sizes)):
            if tail == 0:
                continue
            within = targets[rows] - self.bands[tail][0]
            tail_nats = linear_cross_entropy(self._projected(hidden[rows], tail), self.embeddings[tail], within)
            nats = nats.index_add(0, rows, tail_nats)
        return nats

    def first_choices(self, hidden: Tensor) -> Tensor:
        """The most probable word of each row, chunk by chunk: (N, D) -> (N,) int64."""
        chunks = hidden.split(chunk_rows(self.vocab_size))
        return torch.cat([self.logits(chunk).argmax(-1) for chunk in chunks])

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of the distribution, here its natural logarithms: (..., D) -> (..., V)."""
        hidden = self.dropout(hidden)
        head_size = self.bands[0][1]
        head = scores(hidden, self._head_table()).log_softmax(dim=-1)
        parts = [head[..., :head_size]]
        for tail in range(1, len(self.bands)):
            within = scores(self._projected(hidden, tail), self.embeddings[tail]).log_softmax(dim=-1)
            parts.append(head[..., head_size + tail - 1, None] + within)
        return torch.cat(parts, dim=-1)

    def _head_table(self) -> Tensor:
        """Vectors of the first band's words and of the tails: (c_1 + tails, D)."""
        # Joining the weights copies less than joining the scores would.
        return torch.cat([self.embeddings[0], self.clusters])

    def _projected(self, hidden: Tensor, tail: int) -> Tensor:
        """Hidden states in a tail's dimensions: (n, D) -> (n, D_i)."""
        return self.dropout(F.linear(hidden, self.projections[tail].t()))
