"""The command that continues a prompt: its settings, the text as it is generated, and what was kept and lost."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from alibi_lm import runtime
from alibi_lm.attention import ATTENTION
from alibi_lm.data.tokenizers import LINE_END_ID, UNKNOWN_ID, Tokenizer
from alibi_lm.load import load_run, run_tokenizer
from alibi_lm.model.bound import LOST_SHARE
from alibi_lm.model.generate import Sampling, generate
from alibi_lm.model.streaming import POLICIES, open_cache
from alibi_lm.runs import finished
from alibi_lm.settings import require, require_at_least, require_one_of

BEYOND = ("continue", "stop")


@dataclass
class GenerateConfig:
    """A prompt, a run, and how to continue the prompt."""

    run: str
    """The run folder."""
    prompt: str | None = None
    """Text to continue."""
    file: str | None = None
    """File that holds the prompt instead; - reads standard input."""
    max_tokens: int = 100
    """Tokens to generate."""
    temperature: float = 1.0
    """Logits are divided by it; 0: always the most probable token."""
    top_k: int | None = None
    """Sample from the k most probable tokens only."""
    top_p: float | None = None
    """Sample only from the most probable tokens that together have this probability."""
    seed: int = 1
    """The same seed gives the same text."""
    stop: list[str] = field(default_factory=list)
    """Strings that end the text; they are not part of it."""
    cache: str = "full"
    """full (all keys), proved, certified, or window (no promise)."""
    lost_share: float | None = None
    """proved, certified: share of a query's attention that a head may lose; null: 2^-25."""
    beyond: str = "continue"
    """certified: what to do when more than lost_share may have been lost: continue (and say so) or stop."""
    window: int | None = None
    """window: how many of the last tokens are kept."""
    sinks: int = 0
    """window: how many of the first tokens are kept too."""
    join: bool = False
    """Word level: write WikiText's "2 @-@ 3" as "2-3"."""
    checkpoint: str = "best"
    """best (lowest validation loss), last, or step:<number> of a kept checkpoint."""
    attention: str = "auto"
    """Attention backend."""
    device: str = "auto"
    """auto, cpu or cuda."""
    precision: str = "float32"
    """float32, bfloat16 or auto."""
    threads: int | None = None
    """CPU threads; null: torch's choice."""
    json: bool = False
    """Print one JSON object at the end, and nothing before."""

    def __post_init__(self) -> None:
        require(
            (self.prompt is None) != (self.file is None),
            "There is no prompt, or there are two. Give prompt=<text>, file=<path> or file=- for standard input.",
        )
        for name, allowed in (("cache", POLICIES), ("beyond", BEYOND), ("attention", ATTENTION)):
            value = getattr(self, name)
            require_one_of(name, value, allowed)
        require(
            self.beyond == "continue" or self.cache == "certified",
            f"beyond = {self.beyond} with cache={self.cache}. It belongs to cache=certified.",
        )
        require_at_least("max_tokens", self.max_tokens, 1)
        require_at_least("seed", self.seed, 0)
        require(all(self.stop), f"stop = {self.stop} holds an empty string. Leave it out.")
        self.sampling()

    def sampling(self) -> Sampling:
        """How tokens are chosen."""
        return Sampling(self.temperature, self.top_k, self.top_p)


class TextStream:
    """Text from tokens as they come; holds back text that may be the beginning of a stop string.

    Args:
        tokenizer: the model's.
        after: the token before the first one.
        stop: strings that end the text.
        join: write the joined numbers and hyphens of WikiText without their marks.
    """

    def __init__(self, tokenizer: Tokenizer, after: int, stop: list[str], join: bool) -> None:
        self.tokenizer, self.stop, self.join = tokenizer, stop, join
        self.text, self.stopped = "", False
        self._shown = 0
        self._tokens: list[int] = []
        self._blank = tokenizer.kind == "word" and after != LINE_END_ID

    def feed(self, token: int) -> str:
        """Take one more token and return the text that is now certain."""
        self.text += self._piece(token)
        ends = [at for at in (self.text.find(s, max(0, self._shown - len(s))) for s in self.stop) if at >= 0]
        if ends:
            self.text, self.stopped = self.text[: min(ends)], True
            return self._show(len(self.text))
        begun = (n for s in self.stop for n in range(1, len(s)) if self.text.endswith(s[:n]))
        return self._show(len(self.text) - max(begun, default=0))

    def end(self) -> str:
        """Return the text that was held back."""
        if self._tokens:
            self.text += self.tokenizer.decode(self._tokens)
        return self._show(len(self.text))

    def _show(self, end: int) -> str:
        new, self._shown = self.text[self._shown : end], max(self._shown, end)
        return new

    def _piece(self, token: int) -> str:
        if self.tokenizer.kind != "word":
            # Bytes of one character may be spread over several tokens.
            self._tokens.append(token)
            piece = self.tokenizer.decode(self._tokens)
            if piece.endswith("\ufffd") and len(self._tokens) < 4:
                return ""
            self._tokens = []
            return piece
        word, blank = self.tokenizer.decode([token]), " " if self._blank else ""
        self._blank = token != LINE_END_ID
        if self.join and len(word) == 3 and word[0] == word[2] == "@":
            self._blank = False
            return word[1]
        return word if token == LINE_END_ID else blank + word


def _prompt(config: GenerateConfig) -> str:
    if config.file is None:
        return config.prompt or ""
    try:
        return sys.stdin.read() if config.file == "-" else Path(config.file).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"file = {config.file} cannot be read ({error.strerror or error}).") from None
    except UnicodeDecodeError:
        raise ValueError(f"file = {config.file} is not UTF-8 text. Give a text file.") from None


def run_generate(config: GenerateConfig) -> int:
    """Print the continuation of the prompt as it is generated, then statistics. Returns the exit status.

    Raises:
        ValueError: an unusable prompt, run or cache policy, before the first token.
    """
    folder = Path(config.run)
    require(folder.is_dir(), f"run = {folder}: there is no such folder. Give the folder of a finished run.")
    require(finished(folder) is not None, f"run = {folder} is not finished. Let it train to its end first.")
    device = runtime.start(config.device, threads=config.threads)
    tokenizer = run_tokenizer(folder)
    text = _prompt(config)
    words = tokenizer.encode(text)
    require(len(words) > 0, "The prompt is empty. Give some text to continue.")
    if tokenizer.unknown_id is not None and (unknown := _unknown(tokenizer, text)):
        print(f"not in the vocabulary, read as <unk>: {', '.join(unknown)}", file=sys.stderr)
    model = load_run(
        folder,
        checkpoint=config.checkpoint,
        attention=config.attention,
        device=device,
        precision=config.precision,
    )
    ids = [tokenizer.start_id, *words.tolist()]
    model.serve(len(ids) + config.max_tokens)  # schemes with automatic scaling depend on it
    cache = open_cache(model, config.cache, lost_share=config.lost_share, window=config.window, sinks=config.sinks)
    tokens = generate(model, ids, config.max_tokens, cache=cache, sampling=config.sampling(), seed=config.seed)
    stream, made, status = TextStream(tokenizer, ids[-1], config.stop, config.join), 0, 0

    def show(text: str) -> None:
        if text and not config.json:
            print(text, end="", flush=True)

    allowed, why = LOST_SHARE if config.lost_share is None else config.lost_share, "max_tokens"
    show(config.prompt or "")
    begun = first = time.perf_counter()
    try:
        for token in tokens:
            made += 1
            first = time.perf_counter() if made == 1 else first
            show(stream.feed(token))
            if stream.stopped:
                why = "stopped at a stop string"
                break
            if config.beyond == "stop" and (cache.lost_share or 0.0) > allowed:
                why = "stopped: more than lost_share may have been lost"
                break
    except KeyboardInterrupt:
        why, status = "interrupted", 130
    show(stream.end())
    seconds = time.perf_counter() - first
    speed = (made - 1) / seconds if made > 1 else None
    exceeded = config.cache == "certified" and (cache.lost_share or 0.0) > allowed
    if config.json:
        found = {
            "text": stream.text,
            "tokens": made,
            "prompt_tokens": len(ids),
            "prompt_seconds": first - begun,
            "tokens_per_second": speed,
            "cache": config.cache,
            "keys_held": cache.keys_held,
            "lost_share": cache.lost_share,
            "exceeded": exceeded,
            "ended": why,
        }
        print(json.dumps(found, ensure_ascii=False))
        return status
    lost = cache.lost_share
    share = "nothing is known of what was lost" if lost is None else f"lost share at most {lost:.2g}"
    share = "all of them" if cache.keys_held == cache.tokens_seen else share
    share += f", MORE than lost_share = {allowed:.2g}" if exceeded else ""
    pace = "" if speed is None else f", {speed:,.0f} tokens/s"
    show("\n")
    print(
        f"[{made} tokens after {len(ids)} ({why}){pace}; cache={config.cache}: {cache.keys_held:,.0f} keys held "
        f"per head, {share}]",
        file=sys.stderr,
    )
    return status


def _unknown(tokenizer: Tokenizer, text: str) -> list[str]:
    """The first words of a text that are not in the vocabulary."""
    words = dict.fromkeys(text.split())
    unknown = [w for w in words if w != "<unk>" and tokenizer.encode(w).tolist() == [UNKNOWN_ID]]
    return unknown[:8] + (["..."] if len(unknown) > 8 else [])
