"""The tokenizer that comes with a Hugging Face model, so that a text can be prepared for it as for ours."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alibi_lm.files import write_text
from alibi_lm.settings import require


class HubTokenizer:
    """A tokenizer of transformers: an implementation of `data.tokenizers.TextTokenizer`.

    Nothing is added to the text. The stream begins after the begin token (or, if the tokenizer has none, its end
    token), and each document is followed by the end token, if there is one.

    Args:
        folder: folder of a saved model or tokenizer.
        trust_remote_code: whether Python code in the folder may run.

    Raises:
        ValueError: the folder holds no tokenizer, or one that cannot be loaded.
    """

    kind = "hf"
    whole_documents = True
    """A document that is cut between lines may give other ids: some tokenizers put a space before each piece."""

    def __init__(self, folder: Path, trust_remote_code: bool = False) -> None:
        from transformers import AutoTokenizer

        names = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json", "vocab.txt")
        require(
            any((folder / name).is_file() for name in names),
            f"{folder} holds no tokenizer ({', '.join(names[:3])}). Save the model's own there, with "
            "tokenizer.save_pretrained(<folder>).",
        )
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
        except Exception as error:  # of several libraries, some of which may be missing
            line = " ".join(str(error).split())[:300]
            raise ValueError(f"the tokenizer in {folder} cannot be loaded: {line}") from error
        self._tokenizer: Any = tokenizer
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
            self._backend.encode_special_tokens = True  # "</s>" in the text is text
            content = self._backend.to_str()
        else:
            content = "".join(f"{word}\n{id}\n" for word, id in sorted(tokenizer.get_vocab().items()))
        self._content = content
        file = folder / "tokenizer.json"
        self.hash = hashlib.sha256(file.read_bytes() if file.is_file() else content.encode()).hexdigest()
        self.vocab_size = 1 + max(tokenizer.get_vocab().values())
        begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.document_end_id: int | None = end
        self.unknown_id: int | None = None if tokenizer.unk_token_id == end else tokenizer.unk_token_id
        self.start_id: int = next((id for id in (begin, end) if id is not None), 0)

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        if self._backend is None:
            found = [self._tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        else:
            found = [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        return [np.array(ids, dtype=np.int32) for ids in found]

    def save(self, path: str | Path) -> None:
        write_text(path, self._content)
