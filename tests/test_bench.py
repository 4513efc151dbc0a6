"""The benchmark measures what it says: pairs, words, FLOPs, memory, fields of the results, users' mistakes."""

import bisect
import json
import os
import random
import statistics
import sys
import threading
import warnings
from itertools import accumulate
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from alibi_lm.attention import chosen_backend
from alibi_lm.model.transformer import ModelConfig
from alibi_lm.results.speeds import PAIRS
from alibi_lm.settings import parse
from benchmarks import decoding, report
from benchmarks.measure import Contest, measure, ratio
from benchmarks.peers import PeerProcess, peers
from benchmarks.run import BenchConfig, bench
from benchmarks.subjects import CannotRun, Implementation, Setup, Task, flops_per_token, ours, words

ROOT = Path(__file__).resolve().parent.parent
FIELDS = (
    "device dtype implementation position backend compiled length batch train_tokens_per_second "
    "eval_tokens_per_second train_ratio eval_ratio peak_memory_bytes"
).split()
CPU = torch.device("cpu")
SMALL = ModelConfig(num_layers=1, model_dim=64, num_heads=2, ffn_dim=256)
TINY = "model=tiny vocab_size=64 positions=[alibi] peers=false device=cpu threads=1".split()


def setup(sizes=SMALL, vocab_size=50, length=16):
    return Setup(sizes, vocab_size, length, length, CPU, "float32")


class Machine:
    """A clock, and a machine that becomes twice as fast and slow again at the given times."""

    def __init__(self, jumps=(), time=0.0):
        self.time, self.jumps, self.log = time, list(jumps), []

    def now(self):
        return self.time

    def work(self, amount):
        """Do so many slow seconds of work; returns what it took."""
        began = self.time
        while amount > 0:
            done = bisect.bisect_right(self.jumps, self.time)
            speed = 1 + done % 2
            left = self.jumps[done] - self.time if done < len(self.jumps) else float("inf")
            spent = min(left, amount / speed)
            self.time, amount = self.time + spent, amount - spent * speed
            if spent == left:
                self.time = self.jumps[done]
        return self.time - began


class Fake(Implementation):
    """Steps of a known cost on a simulated machine, give or take three percent."""

    def __init__(self, machine, position, cost, implementation="ours", refuses=()):
        super().__init__(implementation=implementation, position=position, flushes_denormals=True, parameters=1)
        self.machine, self.cost, self.refuses = machine, cost, refuses
        self.noise = random.Random(position)

    def prepare(self, task):
        self.machine.log.append(("prepare", self.position))
        if "all" in self.refuses or ("train" in self.refuses and task.trains):
            raise CannotRun("out of memory")
        return 100

    def seconds(self, kind, task):
        self.machine.log.append((kind, self.position))
        return self.machine.work(self.cost * self.noise.uniform(0.97, 1.03) * (1 if kind == "train" else 0.3))

    def release(self):
        self.machine.log.append(("release", self.position))


def run(machine, contests, seconds, turn=1):
    done = []
    measure(contests, seconds, lambda: machine.work(0.01) or 1e9, done.append, turn, machine.now)
    return done


def one_round(machine, subjects):
    """How long steps were measured before: each subject once, one after the other, over the first one's."""
    times = [(s.seconds("train", None), s.seconds("eval", None))[0] for s in subjects]
    return [times[0] / t for t in times]


def test_pairs_tell_the_true_ratio_on_a_machine_that_changes_speed():
    """Eleven subjects with steps of seconds; the machine's speed jumps by two every 20 to 80 seconds."""
    speeds = {"none": 1.0, "alibi": 1.3, "rotary": 1.0, "t5": 0.9, **{f"peer {k}": 0.5 for k in range(7)}}
    errors, settled, wrong = [], {name: 0 for name in speeds}, []
    for seed in range(40):
        draw = random.Random(seed)
        jumps = list(accumulate(draw.uniform(20, 80) for _ in range(2000)))
        machine = Machine(jumps, time=500.0)
        before = one_round(machine, [Fake(machine, name, 3 / s) for name, s in speeds.items()])
        errors += [found / true for found, true in zip(before, speeds.values(), strict=True)]
        machine = Machine(jumps)
        reference, *others = [Fake(machine, name, 3 / s) for name, s in speeds.items()]
        contests = [Contest(reference, one, Task(1, 4096)) for one in others]
        run(machine, contests, 900)
        for contest in contests:
            found = ratio(contest.ratios("train"))
            name = contest.subject.position
            settled[name] += found.settled
            if found.settled and abs(found.median / speeds[name] - 1) > 0.05:
                wrong.append((seed, name, found))
    assert min(errors) < 0.6 and max(errors) > 1.8, "rounds of tens of seconds measure nonsense here"
    assert not wrong
    assert settled["alibi"] >= 36 and settled["peer 0"] >= 36
    assert settled["rotary"] <= 4, "there is no difference that could be settled"


def test_a_row_that_is_not_settled_says_so_in_its_fields_and_in_the_tables():
    machine = Machine(accumulate(random.Random(1).uniform(1, 6) for _ in range(500)))
    reference = Fake(machine, "none", 3)
    contests = [
        Contest(reference, Fake(machine, name, 3 / s), Task(1, 8)) for name, s in (("t5", 0.98), ("slow", 0.2))
    ]
    run(machine, contests, 400)
    rows = report.rows(contests, "auto", setup())
    assert [row["train_settled"] for row in rows] == [None, False, True]
    lines = {line.split("  ")[0]: line for line in report.table(rows).splitlines()}
    assert "not settled" in lines["ours t5"] and "not settled" not in lines["ours none"] + lines["ours slow"]
    low, high = rows[1]["train_ratio_quartiles"]
    assert f"({low:.2f}-{high:.2f}) not settled" in lines["ours t5"]
    short = report.ratios_markdown(rows).splitlines()
    assert short[2].startswith("| ours none | 1.00 | 1.00 |") and "(not settled)" in short[3]


def test_what_settles_a_ratio():
    assert ratio([]) is None
    assert ratio([1.5] * (PAIRS - 1)).settled is False and ratio([1.5] * PAIRS).settled is True
    wide = ratio([1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6])
    assert (wide.low, wide.median, wide.high) == pytest.approx((1.15, 1.3, 1.45)) and wide.settled
    assert not ratio([0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5]).settled, "0.3 between the quartiles, 0.2 above 1"
    assert ratio([0.5, 0.5, 0.6, 0.6, 0.6, 0.7, 0.7]).settled and not ratio([0.7, 0.7, 0.8, 0.9, 1, 1, 1]).settled


def test_steps_of_a_pair_are_neighbours_and_take_turns_to_be_first():
    machine = Machine()
    none, alibi = Fake(machine, "none", 1), Fake(machine, "alibi", 2)
    contest = Contest(none, alibi, Task(1, 8))
    run(machine, [contest], 12)
    names = [(kind, who) for kind, who in machine.log if who in ("none", "alibi") and kind in ("train", "eval")]
    first, second = names[:4], names[4:8]
    assert first == [("train", "none"), ("train", "alibi"), ("eval", "none"), ("eval", "alibi")]
    assert second == [("train", "alibi"), ("train", "none"), ("eval", "alibi"), ("eval", "none")]
    assert machine.log.count(("prepare", "none")) == machine.log.count(("prepare", "alibi")) == 1
    assert all(abs(a / b - 0.5) < 0.05 for a, b in contest.pairs[1].values()), "reference first, whoever began"
    row = report.rows([contest], "auto", setup())[1]
    assert row["train_tokens_per_second"] == 8 / statistics.median(contest.steps("train"))


def test_contests_share_the_time_and_end_with_it():
    machine = Machine()
    none = Fake(machine, "none", 1)
    cheap, dear, huge = (Contest(none, Fake(machine, f"c{c}", c), Task(1, 8)) for c in (1, 4, 40))
    run(machine, [cheap, dear, huge], 10)
    assert [len(c.pairs) for c in (cheap, dear, huge)] == [1, 1, 1], "each is measured, whatever it takes"
    machine = Machine()
    none = Fake(machine, "none", 1)
    cheap, dear, huge = (Contest(none, Fake(machine, f"c{c}", c), Task(1, 8)) for c in (1, 4, 40))
    done = run(machine, [cheap, dear, huge], 200)
    assert machine.time <= 200 and len(done) == sum(len(c.pairs) for c in (cheap, dear, huge))
    assert len(huge.pairs) == 2 and len(dear.pairs) >= PAIRS and len(cheap.pairs) > 2 * PAIRS
    turns = ["huge" if c is huge else "dear" if c is dear else "cheap" for c in done]
    assert turns[:3] == ["cheap", "dear", "huge"]
    assert turns[3:8].count("cheap") >= 3, "what has had least time goes first"
    assert turns.index("huge", 3) > max(k for k, t in enumerate(turns) if turns[:k].count("dear") < PAIRS), turns


def test_on_a_gpu_a_subject_has_its_pairs_in_one_turn_and_leaves():
    machine = Machine()
    none = Fake(machine, "none", 1)
    run(machine, [Contest(none, Fake(machine, name, 1), Task(1, 8)) for name in ("a", "b")], 1, turn=PAIRS)
    who = [name for kind, name in machine.log if kind == "train"]
    assert set(who[: 2 * PAIRS]) == {"none", "a"} and set(who[2 * PAIRS :]) == {"none", "b"}
    released = machine.log.index(("release", "a"))
    assert released < machine.log.index(("prepare", "b")) and ("release", "none") not in machine.log


def test_what_cannot_run_leaves_a_reason_and_the_others_go_on(capsys):
    machine = Machine()
    none, big, gone = (
        Fake(machine, name, 1, refuses=r) for name, r in (("none", ()), ("big", ("train",)), ("gone", ("all",)))
    )
    contests = [Contest(none, one, Task(1, 8)) for one in (big, gone)]
    run(machine, contests, 20)
    of = {row["position"]: row for row in report.rows(contests, "auto", setup())}
    assert of["big"]["train_ratio"] is None and of["big"]["eval_ratio"] and of["big"]["reason"] is None
    assert of["gone"]["eval_ratio"] is None and of["gone"]["reason"] == "ours gone: out of memory"
    assert of["none"]["eval_tokens_per_second"] > 0
    err = capsys.readouterr().err
    assert "length 8, training, ours big: out of memory" in err and "length 8, ours gone: out of memory" in err


def test_the_lead_over_others_is_a_quotient_of_paired_ratios():
    machine = Machine()
    none = Fake(machine, "none", 3)
    others = [Fake(machine, "alibi", 2), Fake(machine, "learned", 6, implementation="peer")]
    contests = [Contest(none, one, Task(1, n)) for n in (64, 1024) for one in others]
    run(machine, contests, 400)
    rows = report.rows(contests, "auto", setup())
    lead = next(row for row in rows if row["implementation"] == "peer")
    assert lead["alibi_train_speedup"] == pytest.approx(3, rel=0.05) and lead["alibi_train_speedup_settled"]
    assert rows[0]["alibi_eval_speedup"] == rows[1]["eval_ratio"] and rows[1]["alibi_eval_speedup"] == 1
    cell = f"{lead['alibi_train_speedup']:.2f} / {lead['alibi_eval_speedup']:.2f}"
    lines = report.speedups_markdown(rows).splitlines()
    assert lines[0] == "| our ALiBi, times as fast as | 64 | 1,024 |"
    assert lines[2].startswith(f"| peer learned | {cell} |") and len(lines) == 3
    assert report.speedups_markdown(rows[:2]) == ""


def test_flops_against_a_count_by_hand():
    sizes = ModelConfig(num_layers=4, model_dim=256, num_heads=8, ffn_dim=1024)
    # 4 layers of 12 D^2, 8192 words; a token of a 1024-token sequence meets 512 keys on average, twice.
    forward = 2 * (4 * 12 * 256**2 + 8192 * 256) + 4 * 2 * (2 * 256 * 512)
    assert flops_per_token(sizes, 8192, 1024) == 3 * forward


def test_words_have_the_shares_of_a_text():
    """Counted in WikiText-103: 0.933, 0.043 and 0.024 of the words lie in the paper's three bands."""
    ids = words(4, 50_000, 267_744)
    head, last = (ids < 20_000).double().mean().item(), (ids >= 60_000).double().mean().item()
    assert abs(head - 0.933) < 0.02 and abs(last - 0.024) < 0.01
    scores = 20_002 + (1 - head - last) * 40_000 + last * 207_744
    assert scores == pytest.approx(26_646, rel=0.05), "scores of an adaptive vocabulary per token"
    assert torch.equal(ids, words(4, 50_000, 267_744)) and ids.max() < 267_744
    few = words(2, 1000, 8)
    assert few.min() == 0 and few.max() == 7


def test_memory_counts_weights_and_both_means_at_every_length():
    common = setup(vocab_size=10_000, length=64)
    subject = ours(common, ["none"], ["sdpa"], compile=False)[0]
    for length in (16, 64):
        assert subject.prepare(Task(1, length)) >= 3 * 4 * subject.parameters
    alone = ours(common, ["none"], ["sdpa"], compile=False)[0]
    assert 4 * alone.parameters <= alone.prepare(Task(1, 16, trains=False)) < 3 * 4 * alone.parameters


def test_a_scheme_past_its_table_is_a_reason():
    common = Setup(SMALL, 50, 16, 32, CPU, "float32")
    learned = ours(common, ["learned"], ["sdpa"], compile=False)[1]
    with pytest.raises(CannotRun, match="16 positions"):
        learned.prepare(Task(1, 32, trains=False))


def test_a_run_writes_the_documented_fields_and_shows_them_again(tmp_path, capsys):
    arguments = [*TINY, "lengths=[16,33]", "eval_lengths=[70]", "seconds=0.2", "tokens=64"]
    measured = bench(parse(BenchConfig, [*arguments, f"output_dir={tmp_path}"]))
    printed = capsys.readouterr().out
    path = tmp_path / "results.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == measured
    assert [(r["position"], r["length"]) for r in rows] == [
        (p, n) for n in (16, 33, 70) for p in ("none", "alibi")
    ]
    for row in rows:
        assert set(FIELDS) <= set(row) and row["pairs"] >= 1 and row["model"] == "tiny"
        assert (row["implementation"], row["compiled"], row["dtype"]) == ("ours", False, "float32")
        assert row["backend"] == chosen_backend("auto") and row["batch"] == max(1, 64 // row["length"])
        assert (row["train_tokens_per_second"] is None) == (row["length"] == 70)
        assert row["eval_tokens_per_second"] > 0 and row["peak_memory_bytes"] > 0
        assert (row["train_settled"] is None) == (row["position"] == "none" or row["length"] == 70)
        if row["position"] == "none":
            assert row["eval_ratio"] == 1 and row["train_ratio"] in (1, None)
    assert "ratio to none" in printed and str(path) in printed

    assert bench(parse(BenchConfig, [f"show={path}"])) == rows
    shown = capsys.readouterr().out
    table, short = shown.strip().split("\n\n| implementation | train 16 | eval 16 | of matmul 16 |", 1)
    assert "length 16" in table and table in printed
    assert [line.split(" | ")[0] for line in short.splitlines()[2:]] == [
        f"| ours {name} ({chosen_backend('auto')})" for name in ("none", "alibi")
    ]


def test_rows_of_the_time_before_pairs_are_shown():
    files = sorted((ROOT / "docs" / "results" / "bench").glob("*.jsonl"))
    before = [path for path in files if '"pairs"' not in path.read_text()]
    assert {path.name for path in before} >= {"results.jsonl", "compiled.jsonl"}
    for path in before:
        known = report.read(path)
        table = report.table(known)
        assert "ours alibi" in table and "not settled" not in table.split("tokens/s: medians")[0]
        assert all(row["pairs"] == row["rounds"] for row in known)


def test_table_1_stands_beside_the_papers():
    row = {
        "implementation": "ours", "position": "alibi", "length": 512, "compiled": False,
        "train_tokens_per_second": 123456.0, "eval_tokens_per_second": None, "peak_memory_bytes": 7 * 10**9,
    }  # fmt: skip
    line = report.table_1([row]).splitlines()[-1].split()
    assert line == ["alibi", "L=512", "28.3", "123.5", "85.8", "-", "15.3", "7.0"]
    assert report.table_1([{**row, "length": 100}]) == ""


def test_models_are_those_of_the_project():
    small = BenchConfig(model="small").model_config("cpu")
    assert (small.num_layers, small.model_dim, small.dropout) == (8, 512, 0.0)
    assert BenchConfig(model="small", dropout=True).model_config("cpu").dropout == 0.1
    assert BenchConfig().model_config("cpu").model_dim == 256
    assert BenchConfig().model_config("cuda").adaptive_cutoffs == [20000, 60000]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("length=[3]", "length"),
        ("lengths=[1]", "lengths hold 1. Use whole numbers from 2"),
        ("eval_lengths=[2000000]", "lengths hold 2000000"),
        ("lengths=[] eval_lengths=[]", r"lengths = \[\]"),
        ("tokens=0", "tokens = 0. Use a whole number >= 2"),
        ("threads=100000", "threads = 100000"),
        ("vocab_size=1", "vocab_size = 1. Use a whole number >= 8"),
        ("positions=[albi]", r"positions = \['albi'\]. Allowed: none, sinusoidal"),
        ("backends=[]", "backends = "),
        ("model=huge", "model = 'huge'. Allowed: auto, small"),
        ("seconds=never", "seconds = never"),
        ("seconds=0", "seconds = 0"),
        ("clock=cpu", "use threads=1"),
        ("--fast", "is not a setting"),
        ("show=nothing.jsonl", "show = nothing.jsonl"),
        (f"show={ROOT / 'constraints.txt'}", "that make bench wrote"),
    ],
)
def test_mistakes_are_told_before_any_work(argument, message):
    with pytest.raises(ValueError, match=message):
        bench(parse(BenchConfig, argument.split()))


@pytest.mark.parametrize("backend", ["sdpa", chosen_backend("auto")])
def test_a_profile_gives_each_part_its_share(capsys, backend):
    arguments = [*TINY, "profile=true", "lengths=[32]", "positions=[none]", f"backends=[{backend}]", "tokens=64"]
    assert bench(parse(BenchConfig, arguments)) == []
    title, _, *lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert title == f"| part of the step | ours none ({backend}) |"
    shares = {part.strip("| "): int(share.strip(" |%")) for part, share in (line.split(" | ") for line in lines)}
    assert {"loss", "attention", "linear layers", "optimizer, clipping"} < set(shares)
    assert 97 <= sum(shares.values()) <= 103 and list(shares.values()) == sorted(shares.values(), reverse=True)


def test_decoding_is_measured_after_a_cache_of_random_keys():
    config = decoding.DecodingConfig(steps=2, layers=1, model_dim=32, heads=2, vocab_size=50, threads=1)
    rows = [decoding._measure(config, "ALiBi, full", context) for context in (64, 1024)]
    for row in rows:
        tokens = row["context"] + decoding.WARM_UP + config.steps
        assert row["cache_bytes"] == 2 * 4 * config.model_dim * tokens and 0 < row["median_ms"] <= row["p95_ms"]
    refused = {"subject": "BLOOM", "context": 1024, "reason": "transformers is not installed"}
    lines = decoding.table([*rows, refused]).splitlines()
    assert lines[0] == "| milliseconds per token; cache | 64 | 1,024 |" and lines[3] == "| BLOOM | - | - |"
    assert lines[2].endswith("; 0.3 MiB |") and lines[2].startswith(
        f"| ALiBi, full | {rows[0]['median_ms']:.2f} ("
    )


@pytest.mark.slow
def test_every_subject_computes_a_language_models_loss():
    """Peers included, where they are installed: near log V on random tokens, with gradients everywhere."""
    pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        subjects = [*ours(setup(), ["alibi"], ["auto"], compile=False), *peers(setup(), False)]
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
    mine, *others = (s.parameters for s in subjects[1:])
    assert all(0.8 < other / mine < 1.25 for other in others)


def test_a_missing_peer_is_a_line_and_no_failure(monkeypatch):
    monkeypatch.setitem(sys.modules, "x_transformers", None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    lines = list(peers(setup(), False))
    assert len(lines) == 2 and all("not measured" in line for line in lines)


def test_what_is_asked_of_the_other_process_is_done_or_refused(monkeypatch):
    """Its side in a thread of this one."""
    common = setup()
    monkeypatch.setattr("benchmarks.peers.peers", lambda *_: [*ours(common, [], ["sdpa"], compile=False), "none"])

    class Thread(threading.Thread):
        exitcode = -9

        def __init__(self, target, args, daemon):
            theirs = Connection(os.dup(args[0].fileno()))  # a process has a copy of its own
            super().__init__(target=target, args=(theirs, *args[1:]), daemon=daemon)

    monkeypatch.setattr("multiprocessing.context.SpawnContext.Process", Thread)
    with PeerProcess(common, flush_denormals=True) as process:
        assert process.missing == ["none"]
        (peer,) = process.subjects
        assert (peer.label, peer.backend) == ("ours none", "its own")
        assert peer.prepare(Task(2, 16)) > 4 * 3 * peer.parameters and 0 < peer.seconds("train", Task(2, 16)) < 60
        with pytest.raises(CannotRun, match="AttributeError"):
            process.ask(0, "no_such_method")
        assert process.ask(0, "seconds", "eval", Task(1, 4)) > 0, "it goes on after an error"
    with pytest.raises(RuntimeError, match=r"ended with status -9.*peers=false"):
        peer.seconds("eval", Task(1, 4))


@pytest.mark.slow
def test_peers_take_turns_with_us_from_a_process_of_their_own():
    pytest.importorskip("transformers")
    torch.set_flush_denormal(True)
    with PeerProcess(setup(), flush_denormals=False) as process:
        bloom = next(s for s in process.subjects if "BLOOM" in s.label)
        assert (bloom.label, bloom.backend, bloom.flushes_denormals) == (
            "transformers BLOOM alibi",
            "its own",
            False,
        )
        none = ours(setup(), ["none"], ["auto"], compile=False)[0]
        contest = Contest(none, bloom, Task(2, 16))
        contest.run(2, lambda: 1e9)
        assert [sorted(pair) for pair in contest.pairs] == [["eval", "train"]] * 2 and contest.reason is None
        assert all(0 < seconds < 60 for pair in contest.pairs for both in pair.values() for seconds in both)
        assert bloom.peak_memory_bytes[16] > 4 * 3 * bloom.parameters
        with pytest.raises(CannotRun, match="AttributeError"):
            process.ask(0, "no_such_method")
        assert process.ask(0, "seconds", "eval", Task(1, 4)) > 0, "it goes on after an error"
        process._process.kill()
        with pytest.raises(RuntimeError, match=r"ended with status -9.*peers=false"):
            bloom.seconds("eval", Task(1, 4))
