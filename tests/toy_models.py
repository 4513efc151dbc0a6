"""Language models of no library, whose answers are known: what the evaluator asks of a model, and nothing else."""

import torch

from alibi_lm.model.interface import Scores


class Toy:
    """A subclass says what each target costs (`nats`), and which of them it would say itself (`right`)."""

    vocab_size, train_length, max_length, precision, device = 50, 8, None, "float32", torch.device("cpu")
    label, identity = "toy_L8_s1", ""

    def __init__(self, **settings):
        self.served = []
        vars(self).update(settings)

    def serve(self, length):
        self.served.append(length)

    def refuses(self, capability):
        return ""

    def nats(self, inputs, targets, positions, window):
        return torch.zeros(targets.shape)

    def right(self, inputs, targets):
        return torch.zeros_like(targets, dtype=torch.bool)

    def score(self, input_ids, target_ids, *, score_from=0, positions=None, window=None, hits=False):
        nats = self.nats(input_ids, target_ids, positions, window)[:, score_from:]
        return Scores(nats, self.right(input_ids, target_ids)[:, score_from:] if hits else None)
