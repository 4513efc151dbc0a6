"""Other libraries' models of the same sizes, as their users get them, in a separate process.

Our own process keeps freed memory and flushes denormal floats to zero (`runtime.start`), which would make the
others faster than they are elsewhere. The two processes take turns: ours asks, waits, and computes nothing until
the answer arrives.
"""

from __future__ import annotations

import math
import multiprocessing
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from alibi_lm.model.transformer import ModelConfig
from benchmarks.subjects import CannotRun, Implementation, Kind, Setup, Subject, Task


@dataclass(kw_only=True)
class RemoteSubject(Implementation):
    """A subject that lives in the other process."""

    index: int
    process: PeerProcess

    def prepare(self, task: Task) -> int | None:
        return self.process.ask(self.index, "prepare", task)

    def seconds(self, kind: Kind, task: Task) -> float:
        return self.process.ask(self.index, "seconds", kind, task)

    def release(self) -> None:
        self.process.ask(self.index, "release")
        if self.process.device.type == "cuda":
            self.ready.clear()


class PeerProcess:
    """The other process, which ends with the `with` block.

    Attributes:
        subjects: the models found there.
        missing: a line for each library that is not measured, and why.
    """

    def __init__(self, setup: Setup, flush_denormals: bool) -> None:
        self.device = setup.device
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, setup, torch.get_num_threads(), flush_denormals)
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        described, self.missing = self._receive()
        self.subjects = [RemoteSubject(**d, index=i, process=self) for i, d in enumerate(described)]

    def ask(self, index: int, method: str, *arguments: Any) -> Any:
        """Call a method of a subject there and wait for its result.

        Raises:
            CannotRun: the method raised an exception.
            RuntimeError: the process is gone.
        """
        try:
            self._connection.send((index, method, arguments))
        except OSError:
            pass  # gone; receiving says so
        result, problem = self._receive()
        if problem:
            raise CannotRun(problem)
        return result

    def _receive(self) -> Any:
        try:
            return self._connection.recv()
        except (EOFError, OSError) as error:
            self._process.join(10)
            raise RuntimeError(
                f"the process of the other libraries ended with status {self._process.exitcode}, most likely for "
                "lack of memory. Use shorter lengths, or peers=false."
            ) from error

    def __enter__(self) -> PeerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()


def _serve(connection: Connection, setup: Setup, threads: int, flush_denormals: bool) -> None:
    """Build the models, describe them, then serve requests until the other side is gone."""
    torch.set_flush_denormal(flush_denormals)
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")  # the libraries' own
    found = list(peers(setup, flush_denormals))
    subjects = [peer for peer in found if isinstance(peer, Subject)]
    names = ("implementation", "position", "flushes_denormals", "parameters")
    described = [{name: getattr(subject, name) for name in names} for subject in subjects]
    connection.send((described, [peer for peer in found if isinstance(peer, str)]))
    while True:
        try:
            index, method, arguments = connection.recv()
        except (EOFError, OSError):
            return
        try:
            connection.send((getattr(subjects[index], method)(*arguments), ""))
        except CannotRun as error:
            connection.send((None, str(error)))
        except Exception as error:
            connection.send((None, traceback.format_exception_only(error)[-1].strip()))


def peers(setup: Setup, flush_denormals: bool) -> Iterator[Subject | str]:
    """Models of the same sizes, or a line that says why a library is not measured."""
    if setup.sizes.adaptive_cutoffs:
        yield "other libraries are not measured: they have no adaptive vocabulary"
        return
    for build in (_x_transformers, _hugging_face):
        try:
            found = list(build(setup.sizes, setup.vocab_size, setup.train_length))
        except ImportError as error:
            yield f"{error.name or error} is not installed: not measured (pip install 'alibi_lm[bench]')"
            continue
        for implementation, position, module, loss in found:
            if position in ON_REQUEST and position not in setup.positions:
                continue
            yield Subject(
                implementation=implementation,
                position=position,
                flushes_denormals=flush_denormals,
                parameters=sum(p.numel() for p in module.parameters()),
                setup=setup,
                module=module,
                loss=partial(loss, module),
                optimizer=torch.optim.AdamW(module.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True),
            )


ON_REQUEST = ("t5", "xpos", "pope", "fox", "cope")
"""Schemes of other libraries that are measured only if ours are too."""
Found = tuple[str, str, nn.Module, Callable[[nn.Module, Tensor, Tensor], Tensor]]
"""Library, scheme, model, and (model, inputs, targets) -> loss."""


def _x_transformers(sizes: ModelConfig, vocab_size: int, longest: int) -> Iterator[Found]:
    """x-transformers with its fused attention on, which is faster than its default."""
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    def loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return model(inputs)  # it predicts each input from those before it, which is one target fewer than ours

    schemes: dict[str, dict[str, Any]] = {
        "alibi": {"alibi_pos_bias": True, "alibi_num_heads": sizes.num_heads},
        "rotary": {"rotary_pos_emb": True},
        "learned": {},
        "t5": {"rel_pos_bias": True, "attn_flash": False},  # fused attention does not support this
        "xpos": {"rotary_xpos": True},
        "pope": {"polar_pos_emb": True},
        "fox": {"attn_data_dependent_alibi": True},
        "cope": {"attn_use_cope": True, "attn_cope_max_pos": 64, "attn_flash": False},  # nor this
    }
    for position, settings in schemes.items():
        decoder = Decoder(
            dim=sizes.model_dim,
            depth=sizes.num_layers,
            heads=sizes.num_heads,
            attn_dim_head=sizes.head_dim,
            ff_mult=sizes.ffn_dim / sizes.model_dim,
            **{"attn_flash": True, **settings},
        )
        model = TransformerWrapper(
            num_tokens=vocab_size,
            max_seq_len=longest,
            use_abs_pos_emb=position == "learned",
            tie_embedding=True,
            attn_layers=decoder,
        )
        yield "x-transformers", position, AutoregressiveWrapper(model), loss


def _hugging_face(sizes: ModelConfig, vocab_size: int, longest: int) -> Iterator[Found]:
    """Hugging Face's ALiBi models and a rotary one, with their default attention."""

    def loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return model(input_ids=inputs, labels=inputs, use_cache=False).loss

    for name, position in HUGGING_FACE.items():
        yield f"transformers {name}", position, hugging_face_model(name, sizes, vocab_size, longest), loss


HUGGING_FACE = {"BLOOM": "alibi", "MPT": "alibi", "GPT-NeoX": "rotary"}
"""Models of transformers, and their schemes."""


def hugging_face_model(name: str, sizes: ModelConfig, vocab_size: int, longest: int) -> Any:
    """One of them, of these sizes, for sequences of up to `longest` tokens."""
    import transformers as hf

    dim, layers, heads = sizes.model_dim, sizes.num_layers, sizes.num_heads
    if name == "BLOOM":
        bloom = hf.BloomConfig(vocab_size=vocab_size, hidden_size=dim, n_layer=layers, n_head=heads)
        return hf.BloomForCausalLM(bloom)
    if name == "MPT":
        mpt = hf.MptConfig(
            vocab_size=vocab_size,
            d_model=dim,
            n_layers=layers,
            n_heads=heads,
            expansion_ratio=math.ceil(sizes.ffn_dim / dim),
            max_seq_len=longest,
        )
        return hf.MptForCausalLM(mpt)
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
    return hf.GPTNeoXForCausalLM(neox)
