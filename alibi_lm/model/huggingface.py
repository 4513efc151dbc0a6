"""Any causal language model of Hugging Face's transformers, in the form that the evaluator needs.

When a model is loaded, passes over a few random tokens find out what it can do: whether later tokens leave earlier
outputs unchanged, whether its attention can be limited, whether it accepts positions, and whether it has a largest
length. What it cannot do is refused with the reason, never ignored.

`window` is applied through the model's own mask: transformers makes the 4-D mask of every layer with functions
that accept a further condition, here `query - key < window`. So the model's own window (Mistral) and ALiBi biases
that are built from the mask (BLOOM, Falcon) are kept; a mask that is passed in would replace them.

Shape letters: B batch, T tokens, T' scored tokens, V vocabulary.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alibi_lm.model.cross_entropy import chunk_rows
from alibi_lm.model.hub_folder import HubFolder
from alibi_lm.model.interface import Scores, check_ids
from alibi_lm.positions.base import at_least_float32
from alibi_lm.settings import require

IMPLEMENTATIONS = {"auto": None, "eager": "eager", "sdpa": "sdpa", "flex": "flex_attention"}
"""Our names of attention backends -> those of transformers; None: its own choice for the model."""
ROUNDING = {torch.float64: 1e-4, torch.float32: 1e-4}
"""When a model is probed, a change of a logit up to this share of the largest one counts as rounding."""
ROUNDING_OF_HALF = 2e-2


class HuggingFaceLM:
    """A model of transformers: an implementation of `model.interface.LanguageModel`.

    Args:
        model: an `AutoModelForCausalLM`, in evaluation mode on its device.
        label: its name in rows.
        train_length: tokens per training sequence.
        identity: hash of weights and settings; empty: results are not kept.
        max_length: largest number of tokens in a sequence; None: any.

    Raises:
        ValueError: the model gives NaN, or it is not a causal model.
    """

    def __init__(
        self, model: Any, label: str, train_length: int, identity: str = "", max_length: int | None = None
    ) -> None:
        self.model, self.label, self.identity = model, label, identity
        self.train_length, self.max_length = train_length, max_length
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self.precision = str(model.dtype).removeprefix("torch.")
        self.attention = str(model.config._attn_implementation)
        self._takes = set(inspect.signature(model.forward).parameters)
        self._reasons = {"window": "", "positions": ""}
        self._probe()

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def version(self) -> str:
        """Version of the library; another version may compute different numbers."""
        return f"transformers {importlib.metadata.version('transformers')}"

    def serve(self, length: int) -> None:
        if hasattr(self.model, "serve"):  # an exported run of ours
            self.model.serve(length)
        # MPT builds its biases for max_seq_len keys. A longer table starts with the same numbers, counted from the
        # last key, so it changes no result at shorter lengths.
        own = getattr(self.model.config, "max_seq_len", None)
        if isinstance(own, int) and length > own:
            self.model.config.max_seq_len = length

    def refuses(self, capability: str) -> str:
        return self._reasons.get(capability, "")

    @torch.inference_mode()
    def logits(self, input_ids: Tensor) -> Tensor:
        check_ids(self.vocab_size, input_ids)
        return at_least_float32(self._logits(input_ids))

    @torch.inference_mode()
    def score(
        self,
        input_ids: Tensor,
        target_ids: Tensor,
        *,
        score_from: int = 0,
        positions: Tensor | None = None,
        window: int | None = None,
        hits: bool = False,
    ) -> Scores:
        check_ids(self.vocab_size, input_ids, target_ids, score_from)
        width = input_ids.shape[1]
        for name, wanted in (("window", window), ("positions", positions)):
            require(wanted is None or not self.refuses(name), self.refuses(name))
        last = width - 1 if positions is None else int(positions[-1])
        require(
            self.max_length is None or last < self.max_length,
            f"{self.label} has {self.max_length} positions; got position {last}. Use inference_length <= "
            f"{self.max_length}.",
        )
        logits = self._logits(input_ids, positions, window, keep=width - score_from)
        targets = target_ids[:, score_from:].flatten()
        nats, first = [], []
        # In chunks: the softmax of a large vocabulary needs several times the memory of the logits.
        rows = chunk_rows(self.vocab_size)
        for part, wanted_ids in zip(logits.flatten(0, 1).split(rows), targets.split(rows), strict=True):
            nats.append(F.cross_entropy(at_least_float32(part), wanted_ids, reduction="none"))
            if hits:
                first.append(part.argmax(-1) == wanted_ids)
        shape = (len(input_ids), width - score_from)
        return Scores(torch.cat(nats).view(shape), torch.cat(first).view(shape) if hits else None)

    def _logits(
        self, ids: Tensor, positions: Tensor | None = None, window: int | None = None, keep: int | None = None
    ) -> Tensor:
        """Logits of the last `keep` positions in the model's own dtype; None: of all positions."""
        options: dict[str, Any] = {"use_cache": False}
        if keep is not None and "logits_to_keep" in self._takes:
            options["logits_to_keep"] = keep
        if positions is not None:
            # Without a mask, a gap in the positions is taken for the border of packed documents.
            options |= {"position_ids": positions.expand(len(ids), -1), "attention_mask": torch.ones_like(ids)}
        with _limited(self.model, window):
            logits = self.model(ids, **options).logits
        return logits if keep is None else logits[:, -keep:]

    @torch.inference_mode()
    def _probe(self) -> None:
        """Find out by a few passes what the model can do."""
        layers = int(self.model.config.get_text_config().num_hidden_layers)
        length = min(2 * layers + 4, self.max_length or math.inf, 256)
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(self.vocab_size, (1, int(length)), generator=generator).to(self.device)
        plain = self._logits(ids)
        require(
            bool(plain.isfinite().all()),
            f"model = {self.label} gives NaN or infinite scores in {self.precision}. "
            "Use precision=float32; if it does so there too, its weights are damaged.",
        )

        rounding = ROUNDING.get(plain.dtype, ROUNDING_OF_HALF) * plain.abs().max()

        def differ(a: Tensor, b: Tensor) -> Tensor:
            """(T,) bool: positions whose scores differ by more than rounding."""
            return (a - b).abs().amax(-1)[0] > rounding

        other = ids.clone()
        other[:, -1] = (other[:, -1] + 1) % self.vocab_size
        require(
            not differ(self._logits(other), plain)[:-1].any(),
            f"model = {self.label} is not a causal language model: its scores depend on later tokens.",
        )
        self._reasons["window"] = self._probe_window(ids, plain, layers, differ)
        self._reasons["positions"] = self._probe_positions(ids, plain, differ)

    def _probe_window(self, ids: Tensor, plain: Tensor, layers: int, differ: Any) -> str:
        """Why attention cannot be limited; empty if it can. A token reaches layers * (window - 1) further."""
        refused = f"the attention of {self.label} ({self.model.config._attn_implementation}) cannot be limited"
        other = ids.clone()
        other[:, 0] = (other[:, 0] + 1) % self.vocab_size
        try:
            whole = self._logits(ids, window=ids.shape[1])
            narrow = [self._logits(each, window=2) for each in (ids, other)]
        except (ValueError, RuntimeError, TypeError, IndexError, NotImplementedError) as error:
            return f"{refused}: {type(error).__name__}"
        reached = differ(*narrow)
        if differ(whole, plain).any() or reached[layers + 1 :].any() or not reached[1 : layers + 1].any():
            return f"{refused}: its mask takes no further condition"
        return ""

    def _probe_positions(self, ids: Tensor, plain: Tensor, differ: Any) -> str:
        """Why positions cannot be given; empty if they can. A gap in them must change the outputs after it."""
        refused = f"{self.label} cannot be given positions"
        if "position_ids" not in self._takes:
            return f"{refused}: it counts them itself (it has no position_ids)"
        half = ids.shape[1] // 2
        positions = torch.arange(ids.shape[1], device=ids.device)
        if not differ(self._logits(ids, positions=positions), plain).any():
            limit = self.max_length or 4 * ids.shape[1]
            positions[half:] += min(limit - ids.shape[1], 2 * half)
            if differ(self._logits(ids, positions=positions), plain)[half:].any():
                return ""
        return f"{refused}: it does not heed position_ids"


def load_huggingface(found: HubFolder, device: torch.device, precision: str, attention: str) -> HuggingFaceLM:
    """Load the weights of a model that was found, and probe it.

    Args:
        found: from `open_hub_folder`.
        device: where to put it.
        precision: dtype of weights and arithmetic: float32 or bfloat16. The loss is float32 in either case.
        attention: auto (transformers' choice), eager, sdpa or flex.

    Raises:
        ValueError: weights that are damaged or do not fit the config, an attention that the model lacks, NaN, or
            a model that is not causal.
    """
    import transformers
    from transformers import AutoModelForCausalLM

    require(
        attention in IMPLEMENTATIONS,
        f"attention = {attention} with model = {found.source}. Allowed: {', '.join(IMPLEMENTATIONS)}.",
    )
    # transformers 5.23 adds Falcon's biases to the mask, and in this form to the scores as well.
    twice = found.config.model_type == "falcon" and found.config.alibi
    require(
        not (twice and attention == "eager"),
        f"attention = eager with model = {found.source}: transformers adds its biases twice there. Use auto.",
    )
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            found.folder,
            config=found.config,
            dtype=getattr(torch, precision),
            attn_implementation=IMPLEMENTATIONS[attention],
            use_safetensors=True,
            trust_remote_code=found.trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # of transformers, safetensors, torch, and of foreign code
        reason = " ".join(str(error).split())[:400]
        raise ValueError(f"model = {found.source} cannot be loaded: {type(error).__name__}: {reason}") from error
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
    model, report = loaded
    missing = sorted(report["missing_keys"])
    require(
        not missing,
        f"model = {found.source}: {len(missing)} of its weights are in none of its files "
        f"({', '.join(missing[:3])}), so they would be random numbers. Copy or download the model again.",
    )
    longest = _longest(model.eval(), found.config)  # while it is on the CPU
    return HuggingFaceLM(model.to(device), found.name, found.train_length, max_length=longest)


@torch.inference_mode()
def _longest(model: nn.Module, config: Any) -> int | None:
    """The number of positions that a model has; None if there is no limit.

    This is tried on the CPU, because a GPU is unusable after an index out of range.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or "position_ids" not in inspect.signature(model.forward).parameters:
        return None
    ids = torch.zeros((1, 1), dtype=torch.int64)
    try:
        model(ids, position_ids=ids + limit, attention_mask=ids + 1, use_cache=False)
    except (IndexError, RuntimeError, ValueError):
        return limit
    return None


@contextmanager
def _limited(model: Any, window: int | None) -> Iterator[None]:
    """Inside this context, each layer's queries see only keys at distances below `window`; None: no limit."""
    module = vars(sys.modules[type(model.base_model).__module__])
    makers = {n: f for n, f in module.items() if n.startswith("create_") and n.endswith("causal_mask")}

    limit = window or 0

    def near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query - key < limit

    try:
        if window is not None:
            module.update({n: functools.partial(maker, and_mask_function=near) for n, maker in makers.items()})
        yield
    finally:
        module.update(makers)
