"""The adapter with the real lm-evaluation-harness, on tasks made here."""

import json
import math
import shutil

import pytest
import torch

from alibi_lm.data.config import DataConfig
from alibi_lm.data.prepare import prepare
from alibi_lm.evaluate.score import score_tokens
from alibi_lm.experiment import compose
from alibi_lm.train import train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of the harness and of what it stands on
]
lm_eval = pytest.importorskip("lm_eval")
QUESTIONS = [("one two three", ["four", "three two", "five six"], 0), ("b c d", ["e f", "a", "z"], 1)] * 4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on bytes pairs, a few steps long, and a second text of one document."""
    place = tmp_path_factory.mktemp("run")
    words = "one two three four five six a b c d e f".split()
    lines = [" ".join(words[(k * j) % 12] for j in range(1, 9)) for k in range(400)]
    (place / "train.txt").write_text("\n".join(lines) + "\n")
    (place / "validation.txt").write_text("\n".join(lines[:40]) + "\n")
    (place / "test.txt").write_text("\n".join(lines[50:60]) + "\n")
    config = compose(
        [
            "experiment=smoke", "position=alibi", "train_length=16", "steps=30", "tokens_per_step=256",
            "data=text",
            f"data.path={place}", f"data.cache_dir={place / 'cache'}", "tokenizer=bpe", "tokenizer.vocab_size=300",
            "model.model_dim=32", "model.ffn_dim=32", "device=cpu", "threads=1", "evaluation.lengths=[16]",
        ]
    )  # fmt: skip
    train(config, place / "alibi_L16_s1")
    return place / "alibi_L16_s1"


def evaluate(run, tasks, folder, batch_size=1, **model_args):
    from lm_eval.tasks import TaskManager

    import alibi_lm.interop.lm_eval  # noqa: F401

    found = lm_eval.simple_evaluate(
        "alibi_lm",
        model_args={"run": str(run), "device": "cpu"} | model_args,
        batch_size=batch_size,
        tasks=tasks,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
    )
    return found["results"], found["samples"]


@pytest.fixture(scope="module")
def tasks(run, tmp_path_factory):
    """Three tasks in the harness's own form: multiple choice, perplexity of a text, free text."""
    folder = tmp_path_factory.mktemp("tasks")
    choices = [{"question": q, "choices": c, "answer": a} for q, c, a in QUESTIONS]
    text = (run.parent / "validation.txt").read_text()
    for name, records in (("choice", choices), ("rolling", [{"text": text}]), ("free", choices)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    common = (
        "dataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}}}\ntest_split: test\ntask: {name}\n"
    )
    more = {
        "choice": 'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: choices\n'
        "doc_to_target: answer\nmetric_list: [{metric: acc}]\n",
        "rolling": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]\n",
        "free": 'output_type: generate_until\ndoc_to_text: "{{question}}"\ndoc_to_target: "{{choices[0]}}"\n'
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 8}\nmetric_list: [{metric: exact_match}]\n',
    }
    for name, rest in more.items():
        (folder / f"{name}.yaml").write_text(common.format(file=folder / f"{name}.jsonl", name=name) + rest)
    return folder


def test_choices_at_batch_sizes_1_and_8(run, tasks):
    from alibi_lm import load_run
    from alibi_lm.data.tokenizers import Tokenizer

    alone, together = (evaluate(run, ["choice"], tasks, size) for size in (1, 8))
    model, tokenizer = load_run(run), Tokenizer.load(run / "tokenizer.json")
    for one, eight, (question, choices, _) in zip(
        alone[1]["choice"], together[1]["choice"], QUESTIONS, strict=True
    ):
        for (a,), (b,), choice in zip(one["resps"], eight["resps"], choices, strict=True):
            assert float(a[0]) == pytest.approx(float(b[0]), abs=1e-5) and str(a[1]) == str(b[1])
            ids = torch.tensor([tokenizer.encode(f"{question} {choice}").tolist()])
            start = len(tokenizer.encode(question))
            expected = model.log_prob(ids[:, :-1], ids[:, 1:])[0, start - 1 :].sum()
            assert float(a[0]) == pytest.approx(float(expected), abs=1e-4)
    assert alone[0]["choice"]["acc,none"] == together[0]["choice"]["acc,none"]


@pytest.mark.parametrize("length", [16, 40])
def test_rolling_perplexity_is_the_evaluators(run, tasks, length):
    from alibi_lm import load_run

    config = DataConfig("text", path=str(run.parent / "validation.txt"), cache_dir=str(tasks), split_by="none")
    from alibi_lm.data.tokenizers import Tokenizer

    tokenizer = Tokenizer.load(run / "tokenizer.json")
    stream = prepare(config, tokenizer, ["validation"]).split("validation")
    nats = score_tokens(load_run(run), stream.tokens[:-1], tokenizer.start_id, length)  # without the document end
    for size in (1, 8):
        found = evaluate(run, ["rolling"], tasks, size, max_length=length)[0]["rolling"]
        bits = nats.sum(dtype="float64") / math.log(2) / stream.bytes
        assert found["bits_per_byte,none"] == pytest.approx(bits, rel=1e-6)


def test_generation_is_greedy_and_stops(run, tasks):
    from alibi_lm import load_run
    from alibi_lm.data.tokenizers import Tokenizer

    model, tokenizer = load_run(run), Tokenizer.load(run / "tokenizer.json")
    for sample in evaluate(run, ["free"], tasks, max_length=32)[1]["free"]:
        ids = [0, *tokenizer.encode(sample["doc"]["question"]).tolist()]
        new = []
        while len(new) < 8 and "\n" not in tokenizer.decode(new):
            id = int(model(torch.tensor([ids + new]))[0, -1].argmax())
            if id == 0:
                break
            new.append(id)
        assert sample["resps"][0][0] == tokenizer.decode(new).split("\n")[0]


def test_generation_has_the_precision_that_was_asked_for(run):
    from alibi_lm.interop.lm_eval import RunLM

    adapter, seen = RunLM(str(run), device="cpu", precision="bfloat16"), []
    adapter.model.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    adapter._generate([0, 5], [], 2)
    assert seen == [True, True]


def test_what_it_refuses(run, tmp_path):
    from alibi_lm.interop.lm_eval import RunLM

    with pytest.raises(ValueError, match="batch_size = auto"):
        RunLM(str(run), batch_size="auto", device="cpu")
    with pytest.raises(ValueError, match="not a run folder"):
        RunLM(str(shutil.copytree(run / "checkpoints", tmp_path / "x")), device="cpu")
    with pytest.raises(ValueError, match="The continuation 's' of 'one two' has no token of its own"):
        RunLM(str(run), device="cpu")._loglikelihood_tokens([(("one two", "s"), [3, 4], [])])
