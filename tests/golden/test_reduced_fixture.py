"""Parity with the authors' code in every clone, from the reduced data in tests/fixtures/golden_alibi4.

That data lacks most words of the first tail; tests/fixtures/README.md says what can be compared without them.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from alibi_lm.attention import ATTENTION
from alibi_lm.interop.fairseq import FairseqCheckpoint, FairseqSettings, build, train_config
from alibi_lm.model.transformer import TransformerLM

FOLDER = Path(__file__).parent.parent / "fixtures" / "golden_alibi4"
ROWS = [0, 1, 63]
CUTOFFS, VOCAB = (2000, 8000), 19_768


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "expected.safetensors")


def renumbered(ids: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Ids in the reduced vocabulary, where tail 1 is `kept` alone and tail 2 follows it directly."""
    first, last = CUTOFFS
    in_tail_1 = first + torch.searchsorted(kept, ids)
    return torch.where(ids < first, ids, torch.where(ids < last, in_tail_1, ids - last + first + len(kept)))


def reduced_model(expected: dict[str, torch.Tensor], attention: str) -> TransformerLM:
    with safe_open(FOLDER / "weights.safetensors", "pt") as file:
        settings = json.loads(file.metadata()["settings"])
    tensors = {f"decoder.{k}": v for k, v in load_file(FOLDER / "weights.safetensors").items()}
    for band in (1, 2):  # the output layer's names for the same weights
        for part, index in (("1", "0"), ("0", "2")):
            source = f"decoder.embed_tokens.embeddings.{band}.{part}.weight"
            tensors[f"decoder.adaptive_softmax.tail.{band - 1}.{index}.weight"] = tensors[source]
    name = "decoder.embed_tokens.embeddings.0.0.weight"
    tensors["decoder.adaptive_softmax.head.word_proj.weight"] = tensors[name]
    cutoff = CUTOFFS[0] + len(expected["kept_words"])
    settings["adaptive_softmax_cutoff"] = settings["adaptive_input_cutoff"] = f"{CUTOFFS[0]},{cutoff}"
    settings["decoder_input_dim"] = settings["decoder_output_dim"] = settings["decoder_embed_dim"]
    checkpoint = FairseqCheckpoint(
        "fixture", FairseqSettings({"cfg": {"model": settings}}, "fixture"), tensors, 0, None, None
    )
    vocab_size = VOCAB - CUTOFFS[1] + cutoff
    run = train_config(checkpoint, "alibi", vocab_size)
    run.attention = ATTENTION[attention]()
    return build(checkpoint, run, vocab_size)


@pytest.mark.parametrize("attention", sorted(ATTENTION))
@torch.no_grad()
def test_log_probs_equal_the_authors(expected: dict[str, torch.Tensor], attention: str) -> None:
    kept, targets = expected["kept_words"], expected["target_ids"].long()
    model = reduced_model(expected, attention)
    inputs, renamed = renumbered(expected["input_ids"].long(), kept), renumbered(targets, kept)
    comparable = (targets < CUTOFFS[0]) | (targets >= CUTOFFS[1])
    assert comparable.sum() == 59
    assert (targets >= CUTOFFS[1]).sum() == 1

    log_prob = model.log_prob(inputs[None], renamed[None])[0]
    torch.testing.assert_close(log_prob[comparable], expected["log_prob"][comparable], rtol=0, atol=1e-5)
    torch.testing.assert_close(model.hidden(inputs[None])[0, ROWS], expected["hidden"], rtol=0, atol=5e-6)


@torch.no_grad()
def test_log_probs_equal_the_authors_in_float64(expected: dict[str, torch.Tensor]) -> None:
    kept, targets = expected["kept_words"], expected["target_ids"].long()
    model = reduced_model(expected, "eager").double()
    inputs, renamed = renumbered(expected["input_ids"].long(), kept), renumbered(targets, kept)
    comparable = (targets < CUTOFFS[0]) | (targets >= CUTOFFS[1])
    log_prob = model.log_prob(inputs[None], renamed[None])[0]
    torch.testing.assert_close(log_prob[comparable], expected["log_prob_double"][comparable], rtol=0, atol=1e-10)


@torch.no_grad()
def test_the_first_tail_as_a_whole_and_its_kept_words_among_themselves(expected: dict[str, torch.Tensor]) -> None:
    kept = expected["kept_words"]
    model = reduced_model(expected, "eager").double()
    hidden = model.hidden(renumbered(expected["input_ids"].long(), kept)[None])[0, ROWS]
    tail = model.vocabulary.logits(hidden)[:, CUTOFFS[0] : CUTOFFS[0] + len(kept)]
    torch.testing.assert_close(tail.logsumexp(-1), expected["tail_log_prob"], rtol=0, atol=1e-5)
    theirs = expected["kept_log_probs"].double()
    torch.testing.assert_close(tail - tail[:, :1], theirs - theirs[:, :1], rtol=0, atol=1e-5)
