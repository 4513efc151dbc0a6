"""The benchmark measures what it says: pairs, FLOPs, fields of the results file, mistakes of the user."""

import json

import pytest
import torch

from alibi_lm.attention import chosen_backend
from alibi_lm.bench import command, measure, report
from alibi_lm.bench import subjects as subjects_module
from alibi_lm.bench.command import main, parse
from alibi_lm.bench.config import BenchConfig
from alibi_lm.bench.measure import Round, repeat, spread, training_flops
from alibi_lm.bench.peer_process import PeerProcess
from alibi_lm.bench.peers import peers
from alibi_lm.bench.subjects import Task
from alibi_lm.model.transformer import ModelConfig
from alibi_lm.study.claims import Evidence, judge_claim, read_bench
from alibi_lm.study.paper_claims import Claim, Side

FIELDS = (
    "device dtype implementation position backend compiled length batch train_tokens_per_second "
    "eval_tokens_per_second train_ratio eval_ratio peak_memory_bytes"
).split()
TINY = ModelConfig(num_layers=1, model_dim=16, num_heads=2, ffn_dim=32)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(BenchConfig, "model_config", lambda self, device_type: TINY)
    monkeypatch.setattr(subjects_module, "matmul_speeds", lambda *_: [1e9])


def test_a_run_writes_the_documented_fields(tiny, tmp_path, capsys):
    arguments = [
        "lengths=[16,33]",
        "eval_lengths=[70]",
        "positions=[alibi,t5]",
        "peers=false",
        "seconds=1",
        "tokens=64",
    ]
    assert main([*arguments, f"output_dir={tmp_path}", "device=cpu"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {(r["position"], r["length"]) for r in rows} == {
        (p, n) for p in ("none", "alibi", "t5") for n in (16, 33, 70)
    }
    for row in rows:
        assert set(FIELDS) <= set(row)
        assert (
            row["implementation"] == "ours"
            and row["backend"] == chosen_backend("auto")
            and row["compiled"] is False
        )
        assert row["batch"] == max(1, 64 // row["length"]) and row["dtype"] == "float32"
        assert (row["train_tokens_per_second"] is None) == (row["length"] == 70)
        assert row["eval_tokens_per_second"] > 0 and row["peak_memory_bytes"] > 0
        if row["position"] == "none":
            assert row["eval_ratio"] == 1 and row["train_ratio"] in (1, None)
    claim = Claim("x", "s", "t", Side("alibi"), Side("t5"), "above", factor=1e-9, measure="eval_ratio")
    judged = judge_claim(claim, Evidence([], {}, {}, bench=read_bench(tmp_path / "results.jsonl")))
    assert judged.verdict == "HOLDS" and len(judged.instances) == 3
    out = capsys.readouterr().out
    assert "ours alibi" in out and "ratio to none" in out and str(tmp_path / "results.jsonl") in out


def test_every_subject_computes_a_language_models_loss(tiny):
    """Peers included, where they are installed: near log V on random tokens, with gradients everywhere."""
    pytest.importorskip("transformers")
    config = BenchConfig(lengths=[16], eval_lengths=[], positions=["alibi"])
    device, sizes = torch.device("cpu"), ModelConfig(num_layers=1, model_dim=64, num_heads=2, ffn_dim=256)
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        subjects = [*command.ours(config, sizes, 50, device), *peers(config, sizes, 50, device)]
    subjects = [s for s in subjects if not isinstance(s, str)]
    assert len(subjects) >= 5
    ids = torch.randint(0, 50, (4, 17))
    for subject in subjects:
        loss = subject.loss(ids[:, :-1], ids[:, 1:])
        assert loss.ndim == 0 and 2 < loss.item() < 8, subject.label
        before = [p.detach().clone() for p in subject.module.parameters()]
        subject.train_step(ids[:, :-1], ids[:, 1:])
        changed = [not torch.equal(a, b) for a, b in zip(before, subject.module.parameters(), strict=True)]
        assert sum(changed) >= len(changed) - 2, subject.label
    sizes_of = {s.label: sum(p.numel() for p in s.module.parameters()) for s in subjects}
    ours = sizes_of.pop("ours alibi")
    assert all(0.8 < other / ours < 1.25 for other in sizes_of.values()), sizes_of


def test_a_missing_peer_is_a_line_and_no_failure(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "x_transformers", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    lines = list(peers(BenchConfig(lengths=[16]), TINY, 50, torch.device("cpu")))
    assert len(lines) == 2 and all("not measured" in line for line in lines)


def test_peers_are_measured_in_a_process_of_their_own():
    pytest.importorskip("transformers")
    sizes = ModelConfig(num_layers=1, model_dim=64, num_heads=2, ffn_dim=256)
    config = BenchConfig(lengths=[16], eval_lengths=[], precision="float32")
    with PeerProcess(config, sizes, 50, torch.device("cpu")) as process:
        bloom = next(s for s in process.subjects if "BLOOM" in s.label)
        here = next(
            p for p in peers(config, sizes, 50, torch.device("cpu")) if getattr(p, "label", "") == bloom.label
        )
        assert not bloom.flushes_denormals
        assert (bloom.label, bloom.backend, bloom.ours) == ("transformers BLOOM alibi", "its own", False)
        assert bloom.num_parameters == here.num_parameters
        first = bloom.measure(Task(2, 16, 50, trains=True, clock="wall", first=True))
        assert 0 < first.train < 60 and 0 < first.evaluate < 60 and first.peak_memory_bytes > 0
        again = bloom.measure(Task(2, 16, 50, trains=False, clock="wall", first=False))
        assert again.train is None and again.evaluate > 0 and again.peak_memory_bytes is None


def test_a_peer_that_fails_leaves_a_line_and_one_that_dies_an_error(capsys):
    pytest.importorskip("transformers")
    sizes = ModelConfig(num_layers=1, model_dim=64, num_heads=2, ffn_dim=256)
    with PeerProcess(BenchConfig(lengths=[16]), sizes, 50, torch.device("cpu")) as process:
        task = Task(1, 16, 60_000, trains=True, clock="wall", first=False)  # words it does not have
        measured = process.subjects[0].measure(task)
        assert measured.train is None and measured.evaluate is None
        assert f"{process.subjects[0].label} at length 16: IndexError" in capsys.readouterr().err
        process._process.kill()
        with pytest.raises(RuntimeError, match=r"ended with status -9.*peers=false"):
            process.subjects[0].measure(task)


class Fake:
    """A subject of known speed."""

    ours, compiled, precision, backend, flushes_denormals = True, False, "float32", "sdpa", True
    device = torch.device("cpu")

    def __init__(self, label: str, seconds: list[float]) -> None:
        self.label = self.implementation = self.position = label
        self.seconds = seconds


def test_ratios_are_taken_within_rounds_and_the_first_round_is_dropped():
    """A slow-down of the machine hits both sides: paired ratios are 2 throughout, ratios of means are not."""
    base, fast = Fake("none", [9.0, 1.0, 4.0, 2.0]), Fake("fast", [1.0, 0.5, 2.0, 1.0])
    one = Round(8, 2, [base, fast], 50, True, seconds=[1.0] * 4)
    for subject in (base, fast):
        one.times[subject.label + "sdpa"].train = subject.seconds
    assert one.ratios(fast, "train", base) == [2.0, 2.0, 2.0]
    assert one.tokens_per_second(fast, "train") == 16 / 1.0
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, 2.0, 4.0) and spread([]) is None and spread([7.0])[0] == 7.0
    one.times["fastsdpa"].train = [1.0, None, 2.0, 1.0]
    assert one.ratios(fast, "train", base) == [2.0, 2.0], "a failed step leaves its round out"


def test_flops_against_a_count_by_hand():
    sizes = ModelConfig(num_layers=4, model_dim=256, num_heads=8, ffn_dim=1024)
    # 4 layers of 12 D^2, 8192 words; a token of a 1024-token sequence meets 512 keys on average, twice.
    forward = 2 * (4 * 12 * 256**2 + 8192 * 256) + 4 * 2 * (2 * 256 * 512)
    assert training_flops(sizes, 8192, 1024) == 3 * forward


def test_lengths_get_equal_time_and_run_once_at_least(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    class Timed(Round):
        """Of a round's seconds, a tenth is for our own subjects."""

        def run(self, ours_alone=False):
            self.seconds_of_ours = self.length / 10
            self.seconds.append(self.length / (10 if ours_alone else 1))
            clock[0] += self.seconds[-1]

    rounds = [Timed(n, 1, [], 50, True) for n in (1, 4, 50)]
    done = []
    repeat(rounds, 30.0, done.append)
    assert done == rounds
    assert [len(r.seconds) for r in rounds] == [1, 1, 1], "the long one took all of it, and still ran"
    rounds = [Timed(n, 1, [], 50, True) for n in (1, 4, 50)]
    clock[0] = 0.0
    repeat(rounds, 165.0, done.append)
    assert abs(sum(rounds[0].seconds) - sum(rounds[1].seconds)) <= 4
    assert rounds[2].seconds == [50, 5], "ours alone, where all no longer fit"
    assert clock[0] <= 165


def test_a_round_of_ours_leaves_the_others_as_they_were(tiny):
    config = BenchConfig(lengths=[16], eval_lengths=[], positions=["alibi"])
    subjects = list(command.ours(config, TINY, 50, torch.device("cpu")))
    subjects[1].implementation = "peer"
    one = Round(16, 2, subjects, 50, True)
    for ours_alone in (False, True, True):
        one.run(ours_alone)
    ours, peer = subjects
    assert 0 < one.seconds_of_ours < one.seconds[0]
    assert [i for i, _ in one.seconds_of("train", ours)] == [1, 2], "the first one only warms up"
    assert [i for i, _ in one.seconds_of("train", peer)] == [0], "it is all there is"
    assert len(one.ratios(peer, "evaluate", ours)) == 1 and len(one.ratios(ours, "train", ours)) == 2
    row = report.rows([one], TINY, 50)
    assert [r["rounds"] for r in row] == [2, 1] and "2 rounds (1 of others)" in report.table(row)


def test_table_1_stands_beside_the_papers():
    row = {
        "implementation": "ours", "position": "alibi", "length": 512, "compiled": False,
        "train_tokens_per_second": 123456.0, "eval_tokens_per_second": None, "peak_memory_bytes": 7 * 10**9,
    }  # fmt: skip
    line = report.table_1([row]).splitlines()[-1].split()
    assert line == ["alibi", "L=512", "28.3", "123.5", "85.8", "-", "15.3", "7.0"]
    assert report.table_1([{**row, "length": 100}]) == ""


def test_the_lead_over_others_by_length():
    def row(implementation: str, length: int, train: float | None, evaluate: float) -> dict:
        return {
            "implementation": implementation, "position": "alibi", "compiled": False, "backend": "its own",
            "length": length, "alibi_train_speedup": train, "alibi_eval_speedup": evaluate,
        }  # fmt: skip

    rows = [row("ours", 64, 1.0, 1.0), row("a", 64, 2.0, 3.0), row("a", 1024, None, 4.5), row("b", 64, 1.25, 0.5)]
    assert report.speedups_markdown(rows).splitlines() == [
        "| our ALiBi, times as fast as | 64 | 1,024 |",
        "| --- | --: | --: |",
        "| a alibi | 2.00 / 3.00 | - / 4.50 |",
        "| b alibi | 1.25 / 0.50 | - |",
    ]
    assert report.speedups_markdown(rows[:1]) == ""


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("length=[3]", "length"),
        ("lengths=[1]", "lengths hold 1. Use whole numbers >= 2"),
        ("positions=[albi]", r"positions = \['albi'\]. Allowed: none, sinusoidal"),
        ("backends=[]", "Name at least one"),
        ("model=huge", "model = 'huge'. Allowed: auto, small"),
        ("seconds=never", "seconds|never"),
        ("clock=cpu", "use threads=1"),
        ("--fast", "is no setting"),
    ],
)
def test_mistakes_end_in_a_short_message(argument, message, capsys):
    assert main([argument]) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    with pytest.raises(ValueError, match=message):
        parse([argument])


def test_help_lists_the_settings(capsys):
    assert main(["--help"]) == 0
    assert "eval_lengths" in capsys.readouterr().out


def test_a_profile_gives_each_part_its_share(capsys):
    arguments = ["profile=true", "lengths=[32]", "positions=[alibi]", "backends=[eager,sdpa]", "vocab_size=512"]
    assert main([*arguments, "tokens=512", "device=cpu", "threads=1", "peers=false"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert lines[0].split(" | ")[1:3] == ["ours none eager", "ours alibi eager"]
    shares = {line.split(" | ")[0].strip("| "): line for line in lines[2:]}
    for part in ("loss", "attention", "linear layers", "optimizer, clipping"):
        cells = [int(cell.strip(" |%")) for cell in shares[part].split(" | ")[1:]]
        assert len(cells) == 4 and all(cell > 0 for cell in cells), shares[part]
    columns = zip(*([int(c.strip(" |%")) for c in line.split(" | ")[1:]] for line in lines[2:]), strict=True)
    assert all(97 <= sum(column) <= 103 for column in columns)


def test_the_table_is_printed_again_from_its_rows(tmp_path, capsys):
    small = ["lengths=[16]", "eval_lengths=[]", "positions=[alibi]", "vocab_size=64", "tokens=16", "seconds=0.01"]
    assert main([*small, "peers=false", "device=cpu", "threads=1", f"output_dir={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert main([f"show={tmp_path / 'results.jsonl'}"]) == 0
    shown = capsys.readouterr().out
    table, short = shown.strip().split("\n\n| implementation | train 16 | eval 16 | of matmul 16 |\n")
    assert "length 16" in table and table in printed
    assert [line.split(" | ")[0] for line in short.splitlines()[1:]] == [
        f"| ours {name} ({chosen_backend('auto')})" for name in ("none", "alibi")
    ]
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    for name in ("other.jsonl", "nothing.jsonl"):
        assert main([f"show={tmp_path / name}"]) == 1
        assert f"show = {tmp_path / name}" in capsys.readouterr().err
