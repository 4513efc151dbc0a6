"""Python's standard library as a text."""

import pytest

from alibi_lm.data import text
from alibi_lm.data.text import SPLITS, StandardLibrarySource, split_of_file


@pytest.fixture(scope="module")
def source():
    return StandardLibrarySource()


def test_splits_are_disjoint_and_hold_whole_files(source):
    parts = [set(source.files[split]) for split in SPLITS]
    assert len(set.union(*parts)) == sum(map(len, parts))
    assert all(split_of_file(name) == split for split in SPLITS for name in source.files[split])
    assert {"os.py", "json/decoder.py", "ast.py"} <= set.union(*parts)
    sizes = [source.size(split) or 0 for split in SPLITS]
    assert 0.9 < sizes[0] / sum(sizes) < 0.99


def test_split_of_a_file_is_fixed():
    # Results are comparable only while files keep their splits, so a change of the rule must be deliberate.
    files = ["os.py", "json/decoder.py", "ast.py", "pathlib.py", "textwrap.py"]
    assert [split_of_file(name) for name in files] == ["train", "train", "validation", "test", "validation"]
    shares = [sum(split_of_file(f"package/module{k}.py") == split for k in range(2000)) for split in SPLITS]
    assert shares == pytest.approx([1920, 40, 40], abs=20)


def test_a_document_is_a_file_with_its_exact_text(source):
    documents: list[list[str]] = []
    for passage in source.passages("validation"):
        if passage.starts_document:
            documents.append([])
        documents[-1] += passage.lines
    names = source.files["validation"]
    assert len(documents) == len(names)
    for name, lines in zip(names[:5], documents[:5], strict=True):
        content = (source.folder / name).read_text(encoding="utf-8").removeprefix("\ufeff")
        assert "\n".join(lines) + "\n" == content.removesuffix("\n") + "\n"


def test_identity_is_the_text_not_the_moment(source):
    assert StandardLibrarySource().identity() == source.identity()
    record = source.record("train")
    assert source.check("train", record) is None
    assert "has changed" in (source.check("train", {**record, "sha256": "0"}) or "")


def library(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_a_stripped_library_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(text.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(ValueError, match=r"has no os\.py, so .* zipped or stripped\. Use .*data\.path"):
        StandardLibrarySource()
    library(tmp_path, {"os.py": b"x = 1\n"})
    with pytest.raises(ValueError, match="holds only 6 characters"):
        StandardLibrarySource()


def test_what_is_no_working_code_is_left_out(tmp_path, monkeypatch):
    taken = {f"m{k}.py": f"a = {k}\r\n".encode() for k in range(200)}
    taken |= {"os.py": b"pass\n", "bom.py": b"\xef\xbb\xbfb = 1\n", "json/x.py": b"pass\n"}
    left = {"bad.py": b"# \xff\n", "empty.py": b"\n", "data.txt": b"no\n", "_sysconfigdata_x.py": b"no\n"}
    left |= {f"{folder}/p.py": b"no\n" for folder in ("tests", "site-packages", "__pycache__", "idlelib")}
    monkeypatch.setattr(text.sysconfig, "get_paths", lambda: {"stdlib": str(library(tmp_path, taken | left))})
    monkeypatch.setattr(text, "LEAST_CHARACTERS", 1)
    source = StandardLibrarySource()
    assert {name for split in SPLITS for name in source.files[split]} == set(taken)
    lines = {line for split in SPLITS for passage in source.passages(split) for line in passage.lines}
    assert "a = 7" in lines and "b = 1" in lines
