"""Token streams: text encoded once, kept as memory-mapped files beside a manifest, and checked at each opening.

    <cache_dir>/<source>/               a source: name, and a hash of its folder or of its text
        source.json                     tokenizers built from it, digests of its evaluation texts
        <tokenizer>.json                e.g. word8.json, bpe4096.json
        tokens-<tokenizer hash>/        the streams of one tokenizer
            manifest.json, tokenizer.json, <split>.bin, <split>.documents.npy

A split is believed only if the manifest lists it, and the manifest is replaced last, after its files are whole
and on the disk. So an interruption at any moment leaves either a finished split or none; a lock keeps two
processes from preparing the same source at once.

Each opening checks sizes and a fingerprint (samples; everything up to 16 MiB) of the token files and of the
source's files; `verify` reads everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from alibi_lm.data.preparation import SourceFolder
from alibi_lm.data.sources import DataConfig, open_source
from alibi_lm.data.streams import Corpus, TokenStream, open_prepared, stale
from alibi_lm.data.text import SPLITS
from alibi_lm.data.tokenizers import Tokenizer, TokenizerConfig
from alibi_lm.files import sha256_of

__all__ = ["Corpus", "TokenStream", "open_prepared", "prepare", "report", "verify"]


def prepare(
    data: DataConfig,
    tokenizer: TokenizerConfig | Tokenizer,
    splits: Sequence[str] = SPLITS,
    progress: bool = True,
) -> Corpus:
    """Open the token streams of a text, encoding first what is not there yet.

    Args:
        data: which text, and where streams are kept.
        tokenizer: settings of one to be built from the training split (once; it is kept), or a finished one,
            such as that of a run: words unknown to it become `<unk>`.
        splits: those wanted; only they, and the training text where a tokenizer must be built, have to exist.
        progress: show bars where standard error is a terminal.

    Raises:
        ValueError: text missing, empty, damaged or changed since it was prepared; prepared files truncated,
            changed or of another tokenizer. The message says what to do or delete.
    """
    for split in splits:
        if split not in SPLITS:
            raise ValueError(f"split = {split!r}. Allowed: {', '.join(SPLITS)}.")
    source = open_source(data)
    home = SourceFolder(Path(data.cache_dir), source)
    corpus = home.open(tokenizer, splits)
    if corpus is None:
        with _locked(data.cache_dir, home.folder):
            home.build(tokenizer, splits, progress)
            corpus = home.open(tokenizer, splits)
    assert corpus is not None
    return corpus


def verify(corpus: Corpus) -> None:
    """Read every byte of the streams, and of the source's files where they are at hand, and compare digests.

    Raises:
        ValueError: something differs; the message says what to delete.
    """
    home = corpus.folder.parent
    for split, stream in corpus.streams.items():
        entry = corpus.manifest["splits"][split]
        for name, digest in ((entry["file"], "sha256"), (entry["documents_file"], "documents_sha256")):
            if sha256_of(corpus.folder / name) != entry[digest]:
                raise stale(f"{corpus.folder / name} has changed since it was written", corpus.folder)
        largest = max(int(stream.tokens[k : k + (1 << 24)].max()) for k in range(0, stream.num_tokens, 1 << 24))
        if largest >= corpus.vocab_size:
            raise stale(f"{corpus.folder / entry['file']} holds id {largest}, out of range", corpus.folder)
        if corpus.source is not None:
            problem = corpus.source.check(split, entry["source"], full=True)
            if problem:
                raise stale(problem, home)


def report(corpus: Corpus) -> str:
    """What a corpus consists of, for people: source, digests, tokenizer, and the counts of each split."""
    manifest, tokenizer = corpus.manifest, corpus.manifest["tokenizer"]
    source = ", ".join(f"{key} {value}" for key, value in manifest["source"].items() if key != "name")
    lines = [
        f"corpus      {corpus.name} ({corpus.hash})",
        f"source      {source}",
        f"folder      {corpus.folder}",
        f"tokenizer   {tokenizer['label'] or tokenizer['kind']}, vocabulary {corpus.vocab_size:,}, "
        f"sha256 {tokenizer['sha256']}",
    ]
    for split, stream in corpus.streams.items():
        entry = manifest["splits"][split]
        unknown = f", {entry['unknown']:,} of them <unk>" if entry["unknown"] is not None else ""
        lines += [
            f"{split:<11} {stream.num_tokens:,} tokens{unknown}; {stream.words:,} words, {stream.bytes:,} bytes, "
            f"{entry['lines']:,} lines, {len(stream.documents):,} documents",
            f"            text sha256 {stream.text_sha256}",
            f"            tokens sha256 {stream.sha256}",
        ]
        if entry["identity"]:
            lines.append(f"            {entry['identity']}")
    return "\n".join(lines)


@contextmanager
def _locked(cache_dir: str, folder: Path) -> Iterator[None]:
    from filelock import FileLock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            yield
    except OSError as error:
        raise ValueError(
            f"data.cache_dir = {cache_dir}: the streams could not be prepared in {folder} ({error}). The "
            "folder must be writable and have room, the text readable."
        ) from error
