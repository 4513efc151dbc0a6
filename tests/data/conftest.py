"""A small text in WikiText's form, and a folder of it."""

import pytest

from alibi_lm.data.config import DataConfig
from alibi_lm.data.wikitext import TOKENS_FILES

TRAIN = """\
 \n\
 = First article = \n\
 \n\
 the cat sat on the mat , and the dog sat on the <unk> . \n\
 it cost 5 @,@ 000 € in Paris . that is much \n\
 \n\
 = = Section = = \n\
 \n\
 = 1 henry and capacitance C = \n\
 not a title : no blank line follows \n\
 \n\
 = Second = \n\
 \n\
 the dog sat \n\
"""
VALIDATION = " \n = Third article = \n \n the bird sat on the dog \n \n"
TEST = " \n = Fourth = \n \n a cat \n"


@pytest.fixture
def text_folder(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for split, text in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST)):
        (folder / TOKENS_FILES[split]).write_bytes(text.encode())
    return folder


@pytest.fixture
def config(text_folder, tmp_path):
    return DataConfig("wikitext103", path=str(text_folder), cache_dir=str(tmp_path / "cache"))
