"""Our runs in EleutherAI's lm-evaluation-harness (pip install 'alibi_lm[lm-eval]').

    import alibi_lm.interop.lm_eval, lm_eval
    lm_eval.simple_evaluate("alibi_lm", model_args={"run": "<folder>", "max_length": 256}, tasks=["lambada"])

Sequences of equal length share a pass, so nothing is padded, and the batch size changes scores only by rounding.
Rolling log-likelihoods are those of our evaluator: nonoverlapping windows, the last one short. (The harness itself
gives the last window a full context, which makes its perplexity a little lower.)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from alibi_lm import runtime
from alibi_lm.load import load_run, run_tokenizer
from alibi_lm.model.generate import Sampling, generate
from alibi_lm.model.transformer import TransformerLM
from alibi_lm.settings import require
from alibi_lm.tasks.text import TextTask


@register_model("alibi_lm")
class RunLM(TemplateLM):
    """A trained run.

    Args:
        run: the run folder.
        max_length: largest number of tokens per sequence; None: its training length.
        checkpoint: best, last or step:<number>.
        batch_size: sequences per pass.
        device: auto, cpu or cuda.
        precision: float32, bfloat16 or auto.
        others: what the harness passes to all models, such as `max_batch_size`; without effect.

    Raises:
        ValueError: not a run, or more tokens than it has positions.
    """

    def __init__(
        self,
        run: str,
        max_length: int | None = None,
        checkpoint: str = "best",
        batch_size: int | str = 1,
        device: str | None = None,
        precision: str = "float32",
        **others: Any,
    ) -> None:
        super().__init__()
        where = runtime.start(device or "auto")
        self.model: TransformerLM = load_run(
            run, int(max_length) if max_length else None, checkpoint, device=where, precision=precision
        )
        self.tokenizer_ = run_tokenizer(Path(run))
        self.max_length = int(max_length or self.model.train_length)
        limit = self.model.max_length
        require(
            limit is None or self.max_length <= limit,
            f"max_length = {self.max_length}: {self.model.label} has {limit} positions. Use less.",
        )
        require(str(batch_size).isdigit(), f"batch_size = {batch_size}. Use a whole number.")
        self.batch_size = int(batch_size)

    @property
    def eot_token_id(self) -> int:
        """Id of the token before a text."""
        return self.tokenizer_.start_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **others: Any) -> list[int]:
        """Ids of a text; nothing is added."""
        return self.tokenizer_.encode(string).tolist()

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **others: Any
    ) -> list[tuple[float, bool]]:
        """Sum of the log-probabilities of each continuation, and whether greedy decoding would give it.

        Raises:
            ValueError: a continuation without a token.
        """
        inputs, targets, wanted = [], [], []
        for texts, context, continuation in requests:
            require(
                len(continuation) > 0,
                f"The continuation {texts[1]!r} of {texts[0][-40:]!r} has no token of its own: this tokenizer "
                "makes it part of the word before. Begin it with a blank, or give a run with another tokenizer.",
            )
            both = [*context, *continuation][-self.max_length - 1 :]
            inputs.append(both[:-1])
            targets.append(both[1:])
            wanted.append(min(len(continuation), len(both) - 1))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        order = sorted(range(len(requests)), key=lambda k: -len(inputs[k]))
        with tqdm(total=len(order), disable=disable_tqdm or None, leave=False) as bar:
            while order:
                length = len(inputs[order[0]])
                batch = [k for k in order[: self.batch_size] if len(inputs[k]) == length]
                order = order[len(batch) :]
                ids, wanted_ids = (
                    torch.tensor([rows[k] for k in batch], device=self.model.device) for rows in (inputs, targets)
                )
                self.model.serve(length)
                scores = self.model.score(ids, wanted_ids, hits=True)
                assert scores.hits is not None
                for k, nats, hits in zip(batch, scores.nats.double(), scores.hits, strict=True):
                    found[k] = -float(nats[-wanted[k] :].sum()), bool(hits[-wanted[k] :].all())
                bar.update(len(batch))
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text, in windows as in our evaluation."""
        found = []
        for request in tqdm(requests, disable=disable_tqdm or None, leave=False):
            tokens = self.tokenizer_.encode(request.args[0])
            nats = np.zeros(len(tokens))
            self.model.serve(self.max_length)
            for batch in TextTask(tokens, self.eot_token_id).batches(
                self.max_length, self.max_length * self.batch_size
            ):
                ids, targets = (part.to(self.model.device) for part in (batch.input_ids, batch.target_ids))
                nats[batch.numbers] = self.model.score(ids, targets).nats.double().cpu().numpy()
            found.append(-float(nats.sum()))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The most probable next tokens, until a stop string, the end of the text or `max_gen_toks`.

        Raises:
            ValueError: sampling is requested.
        """
        found = []
        for request in tqdm(requests, disable=disable_tqdm or None, leave=False):
            context, options = request.args
            require(
                not options.get("do_sample") and not options.get("temperature"),
                f"gen_kwargs = {options}. Runs of alibi_lm generate greedily here: leave do_sample out.",
            )
            stops = options.get("until") or []
            stops = [stops] if isinstance(stops, str) else list(stops)
            most = min(int(options.get("max_gen_toks", 256)), self.max_length - 1)
            ids = [self.eot_token_id, *self.tok_encode(context)][-(self.max_length - most) :]
            found.append(self._generate(ids, stops, most))
        return found

    def _generate(self, ids: list[int], stops: list[str], most: int) -> str:
        new, text = list[int](), ""
        self.model.serve(self.max_length)
        for id in generate(self.model, ids, most, sampling=Sampling(temperature=0)) if most else ():
            if id == self.tokenizer_.document_end_id:
                break
            new.append(id)
            text = self.tokenizer_.decode(new)
            if cuts := [text.index(stop) for stop in stops if stop in text]:
                return text[: min(cuts)]
        return text
