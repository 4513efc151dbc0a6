"""What is measured: our model with each scheme and backend, and peers as their users get them.

Every subject is one language model of the same sizes, with a step of training and a pass of evaluation over the
same tokens. Peers train with the same optimizer and clipping; their own code computes model and loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from alibi_lm import runtime
from alibi_lm.bench.config import BenchConfig
from alibi_lm.model.compiled import CompiledNats
from alibi_lm.model.transformer import ModelConfig, TransformerLM
from alibi_lm.optim import AdamWConfig, build_optimizer
from alibi_lm.positions import POSITIONS

OURS = "ours"
"""Name of this package among the implementations."""
Loss = Callable[[Tensor, Tensor], Tensor]
"""(inputs (B, T), targets (B, T)) -> mean nats per token, or the like."""


@dataclass
class Subject:
    """One implementation of one scheme."""

    implementation: str
    position: str
    backend: str
    compiled: bool
    module: nn.Module
    loss: Loss
    optimizer: torch.optim.Optimizer
    device: torch.device
    precision: str
    evaluates_in: str = "float32"

    @property
    def ours(self) -> bool:
        """Whether it is this package."""
        return self.implementation == OURS

    @property
    def label(self) -> str:
        """Name in the table."""
        return f"{self.implementation} {self.position}" + (" compiled" if self.compiled else "")

    def train_step(self, inputs: Tensor, targets: Tensor) -> None:
        """Forward, backward, clipping, update."""
        self.module.train()
        with runtime.autocast(self.device, self.precision):
            loss = self.loss(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @torch.inference_mode()
    def evaluate(self, inputs: Tensor, targets: Tensor) -> None:
        """Loss of the tokens, without gradients."""
        self.module.eval()
        with runtime.autocast(self.device, self.evaluates_in):
            self.loss(inputs, targets)

    def state_bytes(self) -> int:
        """Memory of parameters, their gradients and the optimizer's two means."""
        return 4 * sum(p.numel() * p.element_size() for p in self.module.parameters())


def ours(config: BenchConfig, sizes: ModelConfig, vocab_size: int, device: torch.device) -> Iterator[Subject]:
    """Our schemes, `none` first."""
    longest = max([*config.lengths, *(config.eval_lengths or [])])
    names = ["none", *(name for name in config.positions if name != "none")]
    for compiled in (False, True) if config.compile else (False,):
        for backend in config.backends:
            for name in names:
                torch.manual_seed(0)
                model = TransformerLM(
                    sizes, POSITIONS[name](), backend, vocab_size, max(config.lengths or [longest]), longest
                ).to(device)
                optimizer = build_optimizer(AdamWConfig(), model)
                nats = CompiledNats(model) if compiled else model.nats

                def loss(
                    inputs: Tensor, targets: Tensor, nats: Any = nats, model: TransformerLM = model
                ) -> Tensor:
                    # As in training and evaluation: only the training step is ever compiled.
                    return (nats if model.training else model.nats)(inputs, targets).mean()

                yield Subject(OURS, name, backend, compiled, model, loss, optimizer, device, config.precision)


def peers(
    config: BenchConfig, sizes: ModelConfig, vocab_size: int, device: torch.device
) -> Iterator[Subject | str]:
    """Peers of the same sizes, or a line that says why one is not measured."""
    longest = max(config.lengths)
    if sizes.adaptive_cutoffs:
        yield "peers are not measured: they have no adaptive vocabulary (use model=small)"
        return
    for build in (_x_transformers, _hugging_face):
        try:
            found = list(build(sizes, vocab_size, longest))
        except ImportError as error:
            yield f"{error.name or error} is not installed: not measured (pip install 'alibi_lm[bench]')"
            continue
        for implementation, position, module, loss in found:
            module.to(device)
            fused = True if device.type == "cuda" else None
            optimizer = torch.optim.AdamW(module.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=fused)
            yield Subject(
                implementation, position, "its own", False, module, loss, optimizer, device, config.precision
            )


def _x_transformers(
    sizes: ModelConfig, vocab_size: int, longest: int
) -> Iterator[tuple[str, str, nn.Module, Loss]]:
    """x-transformers with its fused attention on, which is faster than its default."""
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    schemes: dict[str, tuple[bool, dict[str, Any]]] = {
        "alibi": (False, {"alibi_pos_bias": True, "alibi_num_heads": sizes.num_heads}),
        "rotary": (False, {"rotary_pos_emb": True}),
        "learned": (True, {}),
    }
    for position, (absolute, settings) in schemes.items():
        decoder = Decoder(
            dim=sizes.model_dim,
            depth=sizes.num_layers,
            heads=sizes.num_heads,
            attn_dim_head=sizes.head_dim,
            ff_mult=sizes.ffn_dim / sizes.model_dim,
            attn_flash=True,
            **settings,
        )
        model = AutoregressiveWrapper(
            TransformerWrapper(
                num_tokens=vocab_size,
                max_seq_len=longest,
                use_abs_pos_emb=absolute,
                tie_embedding=True,
                attn_layers=decoder,
            )
        )

        def loss(inputs: Tensor, targets: Tensor, model: nn.Module = model) -> Tensor:
            # It predicts each input from those before it, one target fewer than we do.
            return model(inputs)

        yield "x-transformers", position, model, loss


def _hugging_face(sizes: ModelConfig, vocab_size: int, longest: int) -> Iterator[tuple[str, str, nn.Module, Loss]]:
    """Hugging Face's ALiBi models and its rotary one, with the attention that it chooses by default."""
    import transformers as hf

    dim, layers, heads = sizes.model_dim, sizes.num_layers, sizes.num_heads
    bloom = hf.BloomConfig(vocab_size=vocab_size, hidden_size=dim, n_layer=layers, n_head=heads)
    mpt = hf.MptConfig(
        vocab_size=vocab_size,
        d_model=dim,
        n_layers=layers,
        n_heads=heads,
        expansion_ratio=math.ceil(sizes.ffn_dim / dim),
        max_seq_len=longest,
    )
    neox = hf.GPTNeoXConfig(
        vocab_size=vocab_size,
        hidden_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=sizes.ffn_dim,
        tie_word_embeddings=True,
        max_position_embeddings=longest,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
    )
    for implementation, position, make in (
        ("transformers BLOOM", "alibi", lambda: hf.BloomForCausalLM(bloom)),
        ("transformers MPT", "alibi", lambda: hf.MptForCausalLM(mpt)),
        ("transformers GPT-NeoX", "rotary", lambda: hf.GPTNeoXForCausalLM(neox)),
    ):
        model = make()

        def loss(inputs: Tensor, targets: Tensor, model: nn.Module = model) -> Tensor:
            return model(input_ids=inputs, labels=inputs, use_cache=False).loss

        yield implementation, position, model, loss
