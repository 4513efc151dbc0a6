"""Tiny models of transformers, made on the spot, with a tokenizer of bytes beside them."""

from pathlib import Path

import torch

VOCAB = 260
WINDOW = 16
"""Of Mistral's and Gemma 2's own attention."""


def configs():
    """name -> a config of two layers; training length 32."""
    import transformers as hf

    llama = {
        "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 32, "max_position_embeddings": 32,
    }  # fmt: skip
    grouped = llama | {"num_key_value_heads": 2, "head_dim": 8}
    return {
        "bloom": hf.BloomConfig(vocab_size=VOCAB, hidden_size=24, n_layer=2, n_head=3, seq_length=32),
        "mpt": hf.MptConfig(vocab_size=VOCAB, d_model=24, n_layers=2, n_heads=3, max_seq_len=32),
        "falcon": hf.FalconConfig(
            vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True,
            multi_query=False, new_decoder_architecture=False, parallel_attn=False, bias=True,
            max_position_embeddings=32,
        ),
        "gpt_neox": hf.GPTNeoXConfig(**llama),
        "gpt2": hf.GPT2Config(
            vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=3, n_positions=32, bos_token_id=0, eos_token_id=0
        ),
        "opt": hf.OPTConfig(
            vocab_size=VOCAB, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, ffn_dim=32,
            max_position_embeddings=32, word_embed_proj_dim=24,
        ),
        "llama": hf.LlamaConfig(**llama),
        "mistral": hf.MistralConfig(**llama, num_key_value_heads=2, sliding_window=WINDOW),
        "qwen2": hf.Qwen2Config(**llama, num_key_value_heads=2),
        "qwen3": hf.Qwen3Config(**grouped),
        "gemma": hf.GemmaConfig(**grouped),
        "gemma2": hf.Gemma2Config(**grouped, sliding_window=WINDOW),
    }  # fmt: skip


def build(name, seed=0, **settings):
    """A model with weights large enough that positions and distant tokens matter."""
    from transformers import AutoModelForCausalLM

    config = configs()[name]
    for key, value in settings.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def save(model, folder: Path, tokenizer: bool = True) -> Path:
    """Save a model, and a tokenizer of bytes beside it."""
    from alibi_lm.data.tokenizers import BytesConfig

    model.save_pretrained(folder)
    if tokenizer:
        BytesConfig().train([]).save(folder / "tokenizer.json")
        special = '"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"'
        (folder / "tokenizer_config.json").write_text(
            f'{{"tokenizer_class": "PreTrainedTokenizerFast", {special}}}\n'
        )
    return folder
