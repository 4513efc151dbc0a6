"""Our runs as models of Hugging Face's transformers: exported, loaded by AutoModelForCausalLM, generated from.

    import alibi_lm.interop.huggingface
    model = AutoModelForCausalLM.from_pretrained("<exported folder>")

The import registers this kind of model; the folder contains no code, so `trust_remote_code` is not needed.
The folder holds config.json, model.safetensors, and a tokenizer that AutoTokenizer loads.

What a run does not support, such as a padded batch, is refused.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from alibi_lm.config import from_dict, load_config
from alibi_lm.data.tokenizers import Tokenizer
from alibi_lm.files import write_json
from alibi_lm.load import build_model, load_run, run_tokenizer
from alibi_lm.model.cache import KeyValueCache
from alibi_lm.settings import require

NOT_EXPORTED = ("data", "study", "measurements", "output_dir", "tracking", "evaluation")
"""Settings that do not describe the model."""


class RunConfig(PretrainedConfig):
    """The config of an exported run.

    Args:
        settings: the settings in the run's config.yaml, nested.
        vocab_size: size of its tokenizer's vocabulary.
        attention: name of the attention backend.
        strength: how much of the position scheme takes part, 1 or 0 (`positions_until`).
    """

    model_type = "alibi_lm"

    def __init__(
        self,
        settings: dict[str, Any] | None = None,
        vocab_size: int = 0,
        attention: str = "auto",
        strength: float = 1.0,
        **others: Any,
    ) -> None:
        model = (settings or {}).get("model", {})
        self.settings, self.vocab_size = settings, vocab_size
        self.attention, self.strength = attention, strength
        self.max_position_embeddings = (settings or {}).get("train_length")
        self.num_hidden_layers, self.hidden_size = model.get("num_layers"), model.get("model_dim")
        self.num_attention_heads = model.get("num_heads")
        self.position_scheme = (settings or {}).get("position", {}).get("name")
        super().__init__(**others)


class RunCache(Cache):
    """Our cache of keys and values, in the form that generation needs."""

    def __init__(self) -> None:
        self.inner = KeyValueCache()
        super().__init__(layers=[])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far."""
        return self.inner.tokens_seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows of the surviving beams."""
        self.inner.take_rows(beam_idx)


class RunForCausalLM(PreTrainedModel, GenerationMixin):
    """A trained run behind the interface of transformers."""

    config_class = RunConfig
    base_model_prefix = "run"

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        require(config.settings is not None, "config.settings is missing: this is not an exported run.")
        self.run = build_model(from_dict(config.settings or {}), config.vocab_size, config.attention)
        self.run.set_strength(config.strength)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Any:
        """Load a model, as for any model of transformers."""
        loaded = super().from_pretrained(*args, **options)
        run = (loaded[0] if isinstance(loaded, tuple) else loaded).run
        # transformers builds a model without values and fills in those of the file. A scheme's tables are computed
        # with the scheme, which is built again for another length.
        run.serve(max(1, run.train_length - 1))
        run.serve(run.train_length)
        return loaded

    def serve(self, length: int) -> None:
        """Prepare for sequences of `length` tokens: schemes with automatic scaling depend on it."""
        self.run.serve(length)

    def _init_weights(self, module: Any) -> None:
        """All weights come from the file."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: RunCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int = 0,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """The forward pass, as for any causal model of transformers.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, S), all ones.
            past_key_values: the cache that an earlier call returned.
            labels: (B, T) int64, the inputs again; -100 is not scored. Gives `loss`, mean nats per token.
            use_cache: whether to return keys and values.
            position_ids: (B, T) int64, the same in all rows; None: after the cache's last one.
            logits_to_keep: return logits of only this many last tokens; 0: all.
            others: ignored switches of the library, such as `return_dict`.

        Raises:
            ValueError: a padded batch, or rows with unequal positions.
        """
        require(
            attention_mask is None or bool(attention_mask.all()),
            "attention_mask has zeros: runs of alibi_lm do not support padding. Give texts of one length.",
        )
        positions = None
        if position_ids is not None:
            positions = position_ids[0]
            require(
                bool((position_ids == positions).all()),
                "position_ids differ between the rows of a batch. Give all rows the same positions.",
            )
        cache = past_key_values if past_key_values is not None else RunCache() if use_cache else None
        hidden = self.run.hidden(input_ids, positions, None if cache is None else cache.inner)
        logits = self.run.vocabulary.logits(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, config: Any, model_kwargs: dict[str, Any], *rest: Any
    ) -> None:
        if config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = RunCache()

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        past_key_values: RunCache | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Only the tokens that the cache has not seen."""
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        given = {"past_key_values": past_key_values, "attention_mask": attention_mask}
        return {"input_ids": input_ids[:, seen:]} | given


AutoConfig.register(RunConfig.model_type, RunConfig, exist_ok=True)
AutoModelForCausalLM.register(RunConfig, RunForCausalLM, exist_ok=True)


@dataclass
class ExportConfig:
    """Settings of scripts/export_huggingface.py."""

    run: str
    """A finished run folder."""
    output_dir: str
    """Folder for the model, new or empty."""
    checkpoint: str = "best"
    """best (lowest validation loss), last, or step:<number> of a kept checkpoint."""


def export_huggingface(config: ExportConfig) -> Path:
    """Write a run as a folder that transformers loads, and load it once to see that it is the same model.

    Raises:
        ValueError: not a run, an output folder that is not empty, or a model that differs after loading.
    """
    folder, output = Path(config.run), Path(config.output_dir)
    require(
        not output.exists() or (output.is_dir() and not any(output.iterdir())),
        f"output_dir = {output} is not empty. Give a new folder.",
    )
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    model = load_run(folder, checkpoint=config.checkpoint)
    tokenizer = run_tokenizer(folder)
    config_of_run = RunConfig(_plain(load_config(folder)), model.vocab_size, strength=model.strength)
    exported = RunForCausalLM(config_of_run).eval()
    exported.run.load_state_dict(model.state_dict())
    try:
        exported.save_pretrained(output)
        _write_tokenizer(tokenizer, output)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(output, ignore_errors=True)  # half a model is worse than none
        raise ValueError(f"output_dir = {output} cannot be written: {error}. Give another folder.") from None
    again = AutoModelForCausalLM.from_pretrained(output)
    ids = torch.arange(min(model.train_length, 64))[None] % model.vocab_size
    with torch.inference_mode():
        same = torch.equal(again(ids).logits, model(ids))
    if not same:
        shutil.rmtree(output, ignore_errors=True)
        raise ValueError(
            f"{folder}, exported, does not load as the same model. Please report this, with the run's config.yaml."
        )
    return output


def _plain(config: Any) -> dict[str, Any]:
    """What the model depends on, as JSON, without the places of text and runs."""
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    kept = {name: value for name, value in settings.items() if name not in NOT_EXPORTED}
    return kept | {"tracking": {"name": "jsonl"}}


def _write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer so that the library alone gives the same ids, with the names of its special tokens."""
    tokenizer.save(folder / "tokenizer.json")
    special: dict[str, Any] = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    if tokenizer.kind == "word":
        # Our own code turns each line end into a word; in the file this is a separate step.
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        content["normalizer"] = {"type": "Replace", "pattern": {"String": "\n"}, "content": " </s> "}
        content["post_processor"] = None
        write_json(folder / "tokenizer.json", content)
        special = {"bos_token": "</s>", "unk_token": "<unk>"}
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(folder / "tokenizer_config.json", kind | special)
