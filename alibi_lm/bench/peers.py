"""Other libraries' models of the same sizes, as their users get them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from alibi_lm.bench.config import BenchConfig
from alibi_lm.bench.subjects import Loss, Subject
from alibi_lm.model.transformer import ModelConfig


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
            optimizer = torch.optim.AdamW(module.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)
            yield Subject(
                implementation,
                position,
                "its own",
                False,
                device,
                config.precision,
                config.flush_peers,
                module,
                loss,
                optimizer,
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
