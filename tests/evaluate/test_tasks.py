"""Tasks of lm-evaluation-harness: scores against our own log-likelihoods, paired differences against formulas."""

import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from burnish.errors import BurnishError, DataError
from burnish.evaluate import Estimate, compare, evaluate
from burnish.evaluate.estimate import jackknife, mean, weighted_mean
from burnish.evaluate.tasks import Answers, Tasks, task_results
from tests.evaluate.test_evaluate import SMALL, save

pytest.importorskip("lm_eval", reason="needs the extra `eval`")
pytestmark = pytest.mark.filterwarnings("ignore:.*lost their beginning")

WORDS = ["a", "single", "man", "in", "possession", "of", "good", "fortune", "must", "be", "want", "wife"]
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: {output_type}
test_split: test
fewshot_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{{target}}}}}"
metric_list: {metrics}
metadata: {{version: 3.0}}
{extra}"""
CHOICE = {"output_type": "multiple_choice", "target": "label", "extra": 'doc_to_choice: "{{choices}}"\n'}
ACCURACY = "[{metric: acc, aggregation: mean, higher_is_better: true}]"


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """Two models, a file of text, and a directory of tasks over 23 questions with three answers each."""
    path = tmp_path_factory.mktemp("tasks")
    (path / "text.txt").write_text(" ".join(WORDS * 40))
    with torch.random.fork_rng():
        save(path / "before")
        save(path / "after", seed=1)
        save(path / "copy")
    draw = random.Random(0)
    docs = [
        {
            "question": " ".join(draw.choices(WORDS, k=draw.randint(1, 4))),
            "choices": [" ".join(draw.choices(WORDS, k=2)) for _ in range(3)],
            "label": draw.randrange(3),
        }
        for _ in range(23)
    ]
    (path / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    tasks = path / "tasks"
    tasks.mkdir()

    def task(name, metrics=ACCURACY, **options):
        values = CHOICE | options
        file = tasks / f"{name}.yaml"
        file.write_text(TASK.format(name=name, data=path / "docs.jsonl", metrics=metrics, **values))

    task("answers")
    task("others", extra=CHOICE["extra"] + "num_fewshot: 0\n")
    task("rolling", "[{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]",
         output_type="loglikelihood_rolling", target="question", extra="")  # fmt: skip
    task("written", "[{metric: exact_match, aggregation: mean, higher_is_better: true}]", output_type="generate_until",
         target="question", extra="generation_kwargs: {until: [' '], max_gen_toks: 6, do_sample: false}\n")  # fmt: skip
    (tasks / "group.yaml").write_text(
        "group: both\ntask: [answers, others]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    return path


@pytest.fixture
def run(home):
    options = SMALL | {"dataset": home / "text.txt", "num_samples": 2, "task_dir": home / "tasks"}
    return lambda *args, **changes: evaluate(*args, **(options | changes))


def docs_of(home):
    return [json.loads(line) for line in (home / "docs.jsonl").read_text().splitlines()]


def own_hits(home, name):
    """1 where the right answer has the highest log-likelihood, by our own forward pass over one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(home / name).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(home / name)
    hits = []
    for doc in docs_of(home):
        context = tokenizer(doc["question"])["input_ids"]
        scores = []
        for choice in doc["choices"]:
            ids = tokenizer(doc["question"] + " " + choice)["input_ids"]
            with torch.no_grad():
                log_p = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
            scores.append(sum(log_p[t, ids[t + 1]].item() for t in range(len(context) - 1, len(ids) - 1)))
        hits.append(float(scores.index(max(scores)) == doc["label"]))
    return np.array(hits)


def test_accuracy_and_paired_difference_are_those_of_our_own_log_likelihoods(home, run):
    (task,) = run(before=home / "before", after=home / "after", tasks=["answers"]).tasks
    before, after = own_hits(home, "before"), own_hits(home, "after")
    assert np.abs(after - before).sum() > 0
    assert [value.value for value in task.values] == pytest.approx([before.mean(), after.mean()])
    errors = [hits.std(ddof=1) / math.sqrt(23) for hits in (before, after)]
    assert [value.standard_error for value in task.values] == pytest.approx(errors)
    assert task.differences[0] is None
    assert task.differences[1].value == pytest.approx((after - before).mean())
    assert task.differences[1].standard_error == pytest.approx((after - before).std(ddof=1) / math.sqrt(23))
    assert task.differences[1].standard_error != pytest.approx(math.hypot(*errors), rel=1e-3)


def test_scores_are_those_of_lm_eval_itself(home, run):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(home / "after"),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(home / "after"),
        batch_size=2,
        max_length=64,
    )
    manager = TaskManager(include_path=str(home / "tasks"), include_defaults=False)
    names = ["answers", "rolling"]
    peer = simple_evaluate(
        model, tasks=names, task_manager=manager, num_fewshot=2, fewshot_random_seed=0, bootstrap_iters=10
    )["results"]
    found = {task.task: task for task in run(home / "after", tasks=names, num_fewshot=2).tasks}
    assert found["answers"].values[0].value == peer["answers"]["acc,none"]
    assert found["answers"].values[0].standard_error == pytest.approx(peer["answers"]["acc_stderr,none"])
    assert found["rolling"].values[0].value == pytest.approx(peer["rolling"]["word_perplexity,none"], rel=1e-6)
    assert found["rolling"].higher_is_better is False


def test_u10_1_each_task_states_its_setting(home, run):
    result = run(before=home / "before", after=home / "after", tasks=["answers", "others"], num_fewshot=2, limit=10)
    answers, others = json.loads(json.dumps(result.to_dict(), allow_nan=False))["tasks"]
    setting = {"task": "answers", "version": "3.0", "num_fewshot": 2, "limit": 10, "chat_template_hash": None,
               "metric": "acc", "filter": "none", "higher_is_better": True, "num_samples": 10}  # fmt: skip
    assert {key: answers[key] for key in setting} == setting
    assert others["num_fewshot"] == 0  # fixed by the task, as in lm-eval
    assert len(answers["values"]) == len(answers["differences"]) == 2
    assert answers["fingerprint"] != others["fingerprint"]
    again = run(home / "before", tasks=["answers"], num_fewshot=2, limit=10, seed=7)
    assert again.tasks[0].fingerprint != answers["fingerprint"]  # other examples


def test_u10_2_every_model_is_asked_the_same(home, run, monkeypatch):
    """Examples are drawn anew for each model; equal weights must give equal scores and a difference of nothing."""
    seen = []
    answer = compare.answer
    monkeypatch.setattr(compare, "answer", lambda *a, **k: seen.append(answer(*a, **k)) or seen[-1])
    result = run(before=home / "before", after=[home / "copy", home / "after"], tasks=["answers"], num_fewshot=3)
    assert len({each["answers"].fingerprint for each in seen}) == 1
    (task,) = result.tasks
    assert task.differences[1] == Estimate(0.0, 0.0)
    assert task.values[0] == task.values[1]


def test_generated_answers_are_those_of_greedy_decoding(home, run, monkeypatch):
    """The first six tokens up to a space, for the first question, against our own loop."""
    from lm_eval.api.task import ConfigurableTask

    seen = []
    process = ConfigurableTask.process_results
    monkeypatch.setattr(
        ConfigurableTask, "process_results", lambda self, doc, found: seen.append(found[0]) or process(self, doc, found)
    )
    (task,) = run(home / "before", tasks=["written"], limit=4).tasks
    assert (task.metric, task.num_samples) == ("exact_match", 4)
    model = AutoModelForCausalLM.from_pretrained(home / "before").eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(home / "before")
    for doc, found in zip(docs_of(home)[:4], seen, strict=True):
        ids = tokenizer(doc["question"])["input_ids"]
        start = len(ids)
        for _ in range(6):
            with torch.no_grad():
                ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
            if ids[-1] == tokenizer.eos_token_id:
                break
        text = tokenizer.decode(ids[start:], skip_special_tokens=True)
        assert found == text.split(" ")[0]


def test_the_chat_template_of_the_first_model_wraps_all_prompts(tmp_path, home, run, monkeypatch):
    shutil.copytree(home / "before", tmp_path / "chat")
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ '<a>' if add_generation_prompt }}"
    (tmp_path / "chat" / "chat_template.jinja").write_text(template)
    options = {"before": tmp_path / "chat", "after": home / "after", "tasks": ["answers"], "limit": 5}
    (plain,) = run(**options).tasks
    assert plain.chat_template_hash is None
    result = run(**options, apply_chat_template=True)
    (wrapped,) = result.tasks
    assert wrapped.chat_template_hash == result.chat_template_hash is not None
    assert wrapped.fingerprint != plain.fingerprint
    assert wrapped.values != plain.values


def test_a_group_is_the_mean_of_its_tasks(home, run):
    both, answers, others = run(before=home / "before", after=home / "after", tasks=["both"], limit=15).tasks
    assert (both.task, both.num_samples) == ("both", 30)
    for model in (0, 1):
        parts = [task.values[model] for task in (answers, others)]
        assert both.values[model].value == pytest.approx(sum(part.value for part in parts) / 2)
        assert both.values[model].standard_error == pytest.approx(math.hypot(*(p.standard_error for p in parts)) / 2)
    assert both.differences[1].value == pytest.approx(both.values[1].value - both.values[0].value)


def test_weights_of_a_mean_are_shares():
    # (1 * 2 + 3 * 6) / 4 = 5; errors hypot(1 * 4, 3 * 1) / 4 = 5 / 4.
    assert weighted_mean([Estimate(2.0, 4.0), Estimate(6.0, 1.0)], [1, 3]) == Estimate(5.0, 1.25)


def test_the_error_of_a_mean_in_closed_form():
    # Deviations -2, -1, 3: sum of squares 14; SE^2 = 14 / (3 * 2).
    assert mean([1.0, 2.0, 6.0]) == Estimate(3.0, pytest.approx(math.sqrt(14 / 6)))
    assert math.isnan(mean([1.0]).standard_error)


def test_the_jackknife_of_a_mean_is_the_error_of_a_mean():
    values = [1.0, 2.0, 6.0, 4.0, 4.5]
    found = jackknife(lambda kept: sum(values[i] for i in kept) / len(kept), 5)
    assert found.value == 3.5
    assert found.standard_error == pytest.approx(mean(values).standard_error)


def test_the_jackknife_of_a_smooth_statistic_is_its_spread_over_repeated_draws():
    """exp of the mean of 400 normal draws in 100 groups, 300 times: the mean of SE^2 against the variance over draws,
    which itself has a relative error of sqrt(2 / 300) = 8 %."""
    draws = np.random.default_rng(0).normal(size=(300, 400))
    found = [jackknife(lambda kept, row=row: math.exp(row[list(kept)].mean()), 400) for row in draws]
    variance = np.var([each.value for each in found], ddof=1)
    assert np.mean([each.standard_error**2 for each in found]) == pytest.approx(variance, rel=0.25)


class Task(SimpleNamespace):
    VERSION = None

    def aggregation(self):
        return {"score": self.aggregate}

    def higher_is_better(self):
        return {}

    def get_config(self, key):
        return 0


def results(before, after, aggregate=max):
    key = ("score", "none")
    answers = [{"t": Answers({key: values}, "same")} for values in (before, after)]
    (found,) = task_results(Tasks({"tasks": {"t": Task(aggregate=aggregate)}}, None, 0), answers, None)
    return found


def test_other_aggregates_are_paired_document_by_document():
    """A product: leaving out one of three documents in both models, by hand."""
    found = results({0: 1.0, 1: 2.0, 2: 4.0}, {0: 3.0, 1: 2.0, 2: 5.0}, math.prod)
    assert [value.value for value in found.values] == [8.0, 30.0]
    left_out = [10 - 8, 15 - 4, 6 - 2]
    spread = sum((value - sum(left_out) / 3) ** 2 for value in left_out)
    assert found.differences[1] == Estimate(22.0, pytest.approx(math.sqrt(2 / 3 * spread)))


def test_different_documents_are_not_paired():
    found = results({0: 1.0, 1: 2.0}, {0: 1.0, 2: 2.0})
    assert found.differences == (None, None)


def test_the_limit_on_length_is_that_of_all_models_and_said(home, run):
    with pytest.warns(UserWarning, match=r"before: \d+ requests were longer than 64 tokens and lost their beginning"):
        run(home / "before", tasks=["answers"], num_fewshot=8)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tasks": ["anwsers"]}, ValueError, r"'anwsers' is not a task of lm-eval or of .*tasks; nearest: answers"),
        ({"tasks": ["answers"], "limit": 0}, ValueError, "limit=0: choose at least 1"),
        ({"tasks": ["answers"], "num_fewshot": -1}, ValueError, "num_fewshot=-1"),
        ({"tasks": ["answers"], "task_dir": "nowhere"}, ValueError, "task_dir=nowhere: no such directory"),
        ({"tasks": ["answers"], "apply_chat_template": True}, ValueError, "before has no chat template"),
        ({"limit": 3}, ValueError, "are about tasks: name some with tasks"),
        ({"batch_sizes": [1, 1]}, ValueError, r"batch_sizes=\[1, 1\]: choose different numbers"),
        ({"batch_sizes": [0]}, ValueError, r"batch_sizes=\[0\]"),
    ],
)
def test_u9_2_bad_options_are_refused_before_loading(home, run, monkeypatch, options, error, message):
    monkeypatch.setattr(compare, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(error, match=message) as caught:
        run(home / "before", **({} if "tasks" in options else {"task_dir": None}) | options)
    assert "\n" not in str(caught.value)


def test_missing_data_of_a_task_are_named(tmp_path, home, run, monkeypatch):
    monkeypatch.setattr(compare, "load_model", lambda *_, **__: pytest.fail("weights were loaded"))
    (tmp_path / "lost.yaml").write_text(
        TASK.format(name="lost", data=tmp_path / "lost.jsonl", metrics=ACCURACY, **CHOICE)
    )
    with pytest.raises(DataError, match=r"tasks lost: cannot be loaded \(.*lost\.jsonl"):
        run(home / "before", tasks=["lost"], task_dir=tmp_path)


def test_code_of_the_model_is_not_run(home, run, monkeypatch):
    from lm_eval.api.task import ConfigurableTask

    monkeypatch.setattr(ConfigurableTask, "UNSAFE_CODE", True, raising=False)
    with pytest.raises(ValueError, match="task answers runs code that the model wrote"):
        run(home / "before", tasks=["answers"])


def test_a_missing_extra_is_named(home, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(BurnishError, match=r"tasks need lm-eval .*: pip install 'burnish\[eval\]'"):
        run(home / "before", tasks=["answers"])


def test_u12_2_global_random_states_and_streams_are_left_alone(home, run, capfd):
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    environment = dict(os.environ)
    first = run(before=home / "before", after=home / "after", tasks=["answers", "rolling"], num_fewshot=1)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert dict(os.environ) == environment
    assert capfd.readouterr() == ("", "")
    again = run(before=home / "before", after=home / "after", tasks=["answers", "rolling"], num_fewshot=1)
    assert again.to_dict() == first.to_dict()


def test_u11_2_a_local_task_opens_no_socket(home):
    """In a process of its own, without the offline variables: what is imported, loaded and asked connects nowhere, and
    sets no variable."""
    code = f"""
import socket
opened = []
def refuse(self, address, *args):
    opened.append(address)
    raise OSError("no network")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = lambda *args, **options: refuse(None, args[0])
import os
from burnish.evaluate import evaluate
home, environment = {str(home)!r}, dict(os.environ)
result = evaluate(home + "/before", dataset=home + "/text.txt", num_samples=2, max_length=32, speed=False,
                  tasks=["answers"], task_dir=home + "/tasks")
print(len(result.tasks), opened, dict(os.environ) == environment)
"""
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_OFFLINE")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "1 [] True\n", done.stderr[-1000:]


def test_progress_counts_requests(home, run):
    import io

    from rich.console import Console

    from burnish.runs import Progress

    console = Console(file=io.StringIO(), width=200)
    run(home / "before", tasks=["answers"], progress=Progress(console=console))
    assert re.search(r"^ask: 69/69 loglikelihood", console.file.getvalue(), re.M)
