"""PreferenceTrainer: against TRL's own, against the written-out objective, and over what it is used with."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from burnish.align.objectives import OBJECTIVES, objective
from burnish.align.trainer import PreferenceTrainer
from burnish.align.trees import branch_logps, collate
from tests.conftest import save_tokenizer

PAIRS = [
    {"prompt": "the sun ", "chosen": "is a star", "rejected": "is cold"},
    {"prompt": "two and two make ", "chosen": "four", "rejected": "five or so"},
    {"prompt": "a", "chosen": "bcd", "rejected": "zyx"},
    {"prompt": "water is ", "chosen": "wet", "rejected": "dry and hot"},
    {"prompt": "once upon ", "chosen": "a time there was", "rejected": "the"},
]

ONE_STEP = {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0}
EIGHT = {"per_device_train_batch_size": 8, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0.0, 0.2)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def arguments(out, **changes):
    defaults = {
        "per_device_train_batch_size": 2, "max_steps": 4, "learning_rate": 1e-3, "lr_scheduler_type": "constant",
        "logging_steps": 1, "report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "save_strategy": "no", "disable_tqdm": True, "seed": 0, "max_length": 64,
    }  # fmt: skip
    return DPOConfig(str(out), **defaults | changes)


def trainer_of(
    model_dir, out, objective="dpo", rows=PAIRS, *, model=None, kind=PreferenceTrainer, changes=(), **options
):
    model = model or AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    if kind is PreferenceTrainer:
        options["objective"] = objective
    else:
        from datasets import Dataset

        rows = Dataset.from_list(rows)
    args = arguments(out, **dict(changes))
    return kind(model=model, args=args, train_dataset=rows, processing_class=tokenizer, **options)


def logged(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


@pytest.mark.parametrize(
    ("loss_type", "layout"),
    [("sigmoid", "padded"), ("sigmoid", "shared"), ("sigmoid", "packed"), ("sigmoid", "auto"), ("ipo", "auto"),
     ("hinge", "auto"), ("robust", "auto")],
)  # fmt: skip
def test_trains_as_trl_does(model_dir, tmp_path, loss_type, layout):
    ours = {"sigmoid": objective("dpo"), "ipo": objective("ipo", average=True), "hinge": objective("hinge"),
            "robust": objective("rdpo", label_smoothing=0.1)}[loss_type]  # fmt: skip
    rows = PAIRS[:4]  # TRL takes means over batches, so that a ragged one would weigh more there
    theirs = trainer_of(model_dir, tmp_path / "a", rows=rows, kind=DPOTrainer,
                        changes={"loss_type": loss_type, "label_smoothing": 0.1 * (loss_type == "robust")})  # fmt: skip
    theirs.train()
    mine = trainer_of(model_dir, tmp_path / "b", ours, rows, layout=layout)
    mine.train()
    assert logged(mine) == pytest.approx(logged(theirs), rel=1e-5)
    assert logged(mine, "rewards/margins")[1:] == pytest.approx(
        logged(theirs, "rewards/margins")[1:], rel=1e-3, abs=1e-6
    )
    assert logged(mine, "logps/chosen") == pytest.approx(logged(theirs, "logps/chosen"), rel=1e-5)
    for name, tensor in weights(mine).items():
        torch.testing.assert_close(tensor, theirs.model.state_dict()[name], rtol=1e-3, atol=2e-5, msg=name)


def test_the_first_loss_is_ln_2(model_dir, tmp_path):
    trainer = trainer_of(model_dir, tmp_path, changes={"max_steps": 1})
    trainer.train()
    assert logged(trainer) == [pytest.approx(math.log(2), rel=1e-6)]


def encoded(model_dir, rows=PAIRS):
    from burnish.data.preferences import PAIRS as LAYOUT
    from burnish.data.preferences import encode_preferences

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    read = [found for row in rows for found in LAYOUT.read(row, "row", LAYOUT.accepted)]
    return [dict(row) for row in encode_preferences(tokenizer, read, 64)[0]]


def tree_logps(model_dir, rows):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        return branch_logps(model, collate(rows, "padded", pad=0)).view(len(rows), -1)


@pytest.mark.parametrize("name", [name for name, row in OBJECTIVES.items() if row.soft and name != "sparse-po"])
def test_u8_2_every_objective_of_pairs_trains_as_it_is_written(model_dir, tmp_path, name):
    """One plain SGD step equals one on the objective of whole logits."""
    rows = [row | {"rewards": [0.3 * place, -0.2], "similarity": 0.8, "label": 0.9 - 0.1 * place}
            for place, row in enumerate(encoded(model_dir))]  # fmt: skip
    bound = objective(name)
    trainer = trainer_of(model_dir, tmp_path, bound, rows, layout="shared",
                         changes=ONE_STEP | {"per_device_train_batch_size": 5})  # fmt: skip
    trainer.train()
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    found = []
    for row in rows:
        for branch in row["branch_ids"]:
            ids = torch.tensor([row["prompt_ids"] + branch])
            logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
            found.append(logps[len(row["prompt_ids"]) - 1 :].sum())
    logps = torch.stack(found).view(5, 2)
    lengths = torch.tensor([[float(len(branch)) for branch in row["branch_ids"]] for row in rows])
    reference, rewards = logps.detach(), torch.tensor([row["rewards"] for row in rows])
    available = {
        "chosen_logps": logps[:, 0], "rejected_logps": logps[:, 1],
        "ref_chosen_logps": reference[:, 0], "ref_rejected_logps": reference[:, 1],
        "chosen_lengths": lengths[:, 0], "rejected_lengths": lengths[:, 1],
        "chosen_rewards": rewards[:, 0], "rejected_rewards": rewards[:, 1],
        "labels": torch.tensor([row["label"] for row in rows]),
        "similarity": torch.full((5,), 0.8), "reliability": torch.full((5,), 0.9),
    }  # fmt: skip
    loss = bound(available).mean()
    loss.backward()
    assert logged(trainer) == [pytest.approx(float(loss), rel=1e-5)]
    for key, tensor in model.named_parameters():
        wanted = tensor.detach() - 1e-3 * tensor.grad
        torch.testing.assert_close(trainer.model.get_parameter(key).detach(), wanted, rtol=1e-4, atol=1e-6, msg=key)


def test_labels_below_one_half_prefer_the_second_completion(model_dir, tmp_path):
    rows = [row | {"label": 0.0} for row in encoded(model_dir)]
    swapped = [row | {"branch_ids": row["branch_ids"][::-1], "label": 1.0} for row in rows]
    first, second = (
        trainer_of(model_dir, tmp_path / str(place), rows=given) for place, given in enumerate((rows, swapped))
    )
    first.train(), second.train()
    assert logged(first) == pytest.approx(logged(second), rel=1e-5)
    assert logged(first, "rewards/accuracies") == logged(second, "rewards/accuracies")


def test_accumulated_and_ragged_batches_weigh_pairs_alike(model_dir, tmp_path):
    """Five pairs in one batch, or in batches of two, two and one: the same step."""
    whole = {"per_device_train_batch_size": 5, "max_steps": 2, "optim": "sgd", "learning_rate": 1e-2}
    parts = whole | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    first = trainer_of(model_dir, tmp_path / "a", changes=whole)
    second = trainer_of(model_dir, tmp_path / "b", changes=parts)
    first.train(), second.train()
    assert logged(first) == pytest.approx(logged(second), rel=1e-5)
    for name, tensor in weights(second).items():
        torch.testing.assert_close(tensor, weights(first)[name], rtol=1e-4, atol=1e-6, msg=name)


def test_evaluation_is_a_mean_over_pairs(model_dir, tmp_path):
    trainer = trainer_of(model_dir, tmp_path, objective("simpo"), eval_dataset=PAIRS,
                         changes={"per_device_eval_batch_size": 2})  # fmt: skip
    rows = encoded(model_dir)
    logps = tree_logps(model_dir, rows)
    lengths = torch.tensor([[float(len(branch)) for branch in row["branch_ids"]] for row in rows])
    wanted = objective("simpo")({"chosen_logps": logps[:, 0], "rejected_logps": logps[:, 1],
                                 "chosen_lengths": lengths[:, 0], "rejected_lengths": lengths[:, 1]})  # fmt: skip
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(float(wanted.mean()), rel=1e-5)
    assert found["eval_logps/rejected"] == pytest.approx(float(logps[:, 1].mean()), rel=1e-5)


def parameters_alive():
    import gc

    return sum(tensor.numel() for tensor in gc.get_objects() if isinstance(tensor, torch.nn.Parameter))


@pytest.mark.parametrize("name", ["dpo", "simpo"])
def test_u8_1_no_reference_model_is_in_memory(model_dir, tmp_path, name):
    import gc

    gc.collect()
    before = parameters_alive()
    trainer = trainer_of(model_dir, tmp_path, name)
    gc.collect()
    own = sum(tensor.numel() for tensor in trainer.model.parameters())
    assert parameters_alive() - before == own
    assert ("ref_logps" in trainer.train_dataset.column_names) == (name == "dpo")


def test_another_reference_is_looked_up_and_let_go(model_dir, tmp_path):
    """Pre-DPO: the reference is a guide, not the model that training begins with."""
    guide = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.no_grad():
        guide.lm_head.weight.mul_(1.5)
        rows = encoded(model_dir)
        wanted = branch_logps(guide, collate(rows, "padded", pad=0)).view(5, 2)
    trainer = trainer_of(model_dir, tmp_path, ref_model=guide)
    assert trainer.ref_model is None
    torch.testing.assert_close(torch.tensor(trainer.train_dataset["ref_logps"]), wanted, rtol=1e-5, atol=1e-5)
    trainer.train()
    assert logged(trainer)[0] != pytest.approx(math.log(2), abs=1e-3)


def test_adapters_switched_off_are_the_reference(model_dir, tmp_path):
    import peft

    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = trainer_of(model_dir, tmp_path, peft_config=config, changes={"learning_rate": 1e-2})
    wanted = tree_logps(model_dir, encoded(model_dir))
    torch.testing.assert_close(torch.tensor(trainer.train_dataset["ref_logps"]), wanted, rtol=1e-5, atol=1e-5)
    trainer.train()
    losses = logged(trainer)
    assert losses[0] == pytest.approx(math.log(2), rel=1e-6) and losses[-1] != losses[0]
    assert all("lora_" in name for name, tensor in trainer.model.named_parameters() if tensor.requires_grad)


@pytest.mark.parametrize("name", ["dpo", "lcpo"])
def test_u2_1_a_resumed_training_is_the_same(model_dir, tmp_path, name):
    rows = [row | {"annotator": "ab"[place % 2]} for place, row in enumerate(encoded(model_dir))]
    changes = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = trainer_of(model_dir, tmp_path / "a", name, rows, changes=changes)
    whole.train()
    rest = trainer_of(model_dir, tmp_path / "b", name, rows, changes=changes)
    rest.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for key, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(rest)[key]), key
    assert logged(whole)[2:] == logged(rest)[2:]
    assert torch.equal(whole.reliabilities.values, rest.reliabilities.values)


def test_lcpo_learns_how_reliable_each_annotator_is(model_dir, tmp_path):
    rows = [row | {"annotator": "good"} for row in encoded(model_dir)] * 3
    wrong = [row | {"branch_ids": row["branch_ids"][::-1], "annotator": "bad"} for row in rows[:5]]
    trainer = trainer_of(model_dir, tmp_path, objective("lcpo", beta=1.0), rows + wrong,
                         changes={"max_steps": 60, "per_device_train_batch_size": 10})  # fmt: skip
    trainer.train()
    found = dict(zip(trainer.reliabilities.names, trainer.reliabilities.values.tolist(), strict=True))
    assert found["good"] > 0.9 > 0.5 > found["bad"]
    assert found[""] == 0.9


def test_kto_pairs_each_prompt_with_the_completion_before(model_dir, tmp_path):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"], "label": place % 2 == 0}
            for place, row in enumerate(PAIRS)]  # fmt: skip
    bound = objective("kto", beta=0.5, undesirable_weight=0.7)
    guide = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.no_grad():
        guide.lm_head.weight.mul_(1.5)
    trainer = trainer_of(model_dir, tmp_path, bound, rows, ref_model=guide,
                         changes={"max_steps": 1, "per_device_train_batch_size": 5})  # fmt: skip
    trees = [dict(row) for row in trainer.train_dataset]
    for place, tree in enumerate(trees):
        assert tree["branch_ids"][1] == trees[place - 1]["branch_ids"][0]
    trainer.train()
    own, reference = tree_logps(model_dir, trees), torch.tensor([tree["ref_logps"] for tree in trees])
    z = (own[:, 1] - reference[:, 1]).mean().clamp(min=0)
    assert z > 0
    logit = 0.5 * (own[:, 0] - reference[:, 0] - z)
    label = torch.tensor([1.0, 0, 1, 0, 1])
    wanted = label * (1 - logit.sigmoid()) + (1 - label) * 0.7 * (1 - (-logit).sigmoid())
    assert logged(trainer) == [pytest.approx(float(wanted.mean()), rel=1e-5)]


def count_of_a(policy, rows, seed):
    """Two completions of three tokens for each prompt, drawn one by one; their reward counts a token."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for row in rows:
        branches = []
        for _ in range(4):
            ids = list(row["prompt_ids"])
            for _ in range(3):
                p = policy(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)
                ids.append(int(torch.multinomial(p, 1, generator=draw)))
            branches.append(ids[len(row["prompt_ids"]) :])
        rewards = [float(branch.count(40)) for branch in branches]
        found.append(row | {"branch_ids": branches, "rewards": rewards})
    return found


def test_reverse_kl_draws_from_the_policy_and_raises_the_reward(model_dir, tmp_path):
    rows = [{"prompt_ids": [1, 10, 20 + place]} for place in range(8)]
    trainer = trainer_of(model_dir, tmp_path, objective("rkl", gamma=0.01, beta=0.0), rows, rollout=count_of_a,
                         changes=EIGHT | {"max_steps": 30})  # fmt: skip
    trainer.train()
    rewards = logged(trainer, "reward")
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.5
    assert all(entry > 0 for entry in logged(trainer, "entropy")[:5])
    assert logged(trainer, "kl")[0] == pytest.approx(0, abs=1e-5)
    again = trainer_of(model_dir, tmp_path / "again", objective("rkl", gamma=0.01, beta=0.0), rows, rollout=count_of_a,
                       changes=EIGHT | {"max_steps": 3})  # fmt: skip
    again.train()
    assert logged(again, "reward") == rewards[:3]


def test_the_on_policy_kl_holds_the_policy_to_its_reference(model_dir, tmp_path):
    ends = {}
    for weight in (0.0, 5.0):
        trainer = trainer_of(model_dir, tmp_path / str(weight), objective("pmle", gamma=1.0, kl=weight), PAIRS,
                             rollout=count_of_a if weight else None,
                             changes=EIGHT | {"max_steps": 15, "learning_rate": 3e-3})  # fmt: skip
        trainer.train()
        prompts = encoded(model_dir)
        drawn = count_of_a(trainer.model, prompts * 6, 7)
        with torch.no_grad():
            now = branch_logps(trainer.model, collate(drawn, "padded", pad=0))
        ends[weight] = float((now - tree_logps(model_dir, drawn).flatten()).mean())
    assert 0 < ends[5.0] < 0.5 * ends[0.0]


def test_the_gradient_of_drawn_completions_is_the_score_function(model_dir, tmp_path):
    """With k drawn completions: -(S - mean of the others) grad ln pi, averaged."""
    rows = [{"prompt_ids": [1, 10, 20 + place]} for place in range(3)]
    trainer = trainer_of(model_dir, tmp_path, objective("rkl", gamma=0.3, beta=0.0), rows, rollout=count_of_a,
                         changes=ONE_STEP | {"per_device_train_batch_size": 3})  # fmt: skip
    drawn = []
    inner = trainer.rollout
    trainer.rollout = lambda policy, rows, seed: drawn.extend(inner(policy, rows, seed)) or drawn
    trainer.train()
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    logps = branch_logps(model, collate(drawn, "padded", pad=0)).view(3, 4)
    score = torch.tensor([row["rewards"] for row in drawn]) - 0.3 * logps.detach()
    others = (score.sum(1, keepdim=True) - score) / 3
    (-((score - others) * logps).mean(1).mean()).backward()
    for name, tensor in model.named_parameters():
        wanted = tensor.detach() - 1e-3 * tensor.grad
        torch.testing.assert_close(trainer.model.get_parameter(name).detach(), wanted, rtol=1e-4, atol=1e-6, msg=name)


def test_pairs_that_are_drawn_estimate_the_divergence_themselves(model_dir, tmp_path):
    """PD with a KL term on its own two samples: their gradient is that of the score function beside the pair loss."""
    import peft

    def two_of_four(policy, rows, seed):
        return [
            row | {"branch_ids": row["branch_ids"][:2], "rewards": row["rewards"][:2]}
            for row in count_of_a(policy, rows, seed)
        ]

    rows, bound, drawn = [{"prompt_ids": [1, 10, 20 + place]} for place in range(4)], objective("pd", kl=2.0), []
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    trainer = trainer_of(model_dir, tmp_path, bound, rows, peft_config=config,
                         rollout=lambda *given: drawn.extend(two_of_four(*given)) or drawn,
                         changes=ONE_STEP | {"per_device_train_batch_size": 4, "learning_rate": 0.1})  # fmt: skip
    model = trainer.model
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters() if tensor.requires_grad}
    trainer.train()
    after = {name: tensor.detach().clone() for name, tensor in model.named_parameters() if tensor.requires_grad}
    for name, tensor in before.items():
        model.get_parameter(name).data.copy_(tensor)
    batch = collate(drawn, "padded", pad=0)
    with model.disable_adapter(), torch.no_grad():
        reference = branch_logps(model, batch).view(4, 2)
    logps = branch_logps(model, batch).view(4, 2)
    ratio = (logps - reference).detach()
    assert ratio.abs().max() > 0.01
    rewards = torch.tensor([row["rewards"] for row in drawn])
    pairs = objective("pd")({"chosen_logps": logps[:, 0], "rejected_logps": logps[:, 1], "labels": torch.ones(4),
                             "chosen_rewards": rewards[:, 0], "rejected_rewards": rewards[:, 1]})  # fmt: skip
    assert logged(trainer) == [pytest.approx(float(pairs.mean() + 2 * ratio.mean()), rel=1e-4)]
    kl = ((ratio - ratio.flip(1)) * logps).mean(1)
    model.zero_grad()
    (pairs.mean() + 2 * kl.mean()).backward()
    for name, tensor in before.items():
        wanted = tensor - 0.1 * model.get_parameter(name).grad
        torch.testing.assert_close(after[name], wanted, rtol=1e-4, atol=1e-6, msg=name)


def test_prompts_weigh_alike_however_many_pairs_are_drawn(model_dir, tmp_path):
    rows, ends = [{"prompt_ids": [1, 10, 20 + place]} for place in range(3)], []
    for times in (1, 2):

        def drawn(policy, rows, seed, times=times):
            found = count_of_a(policy, rows, 0)
            return [row | {"branch_ids": row["branch_ids"][:2], "rewards": row["rewards"][:2]} for row in found] * times

        trainer = trainer_of(model_dir, tmp_path / str(times), "simpo", rows, rollout=drawn,
                             changes=ONE_STEP | {"per_device_train_batch_size": 3, "learning_rate": 0.1})  # fmt: skip
        trainer.train()
        ends.append(weights(trainer))
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_every_draw_has_a_seed_of_its_own(model_dir, tmp_path):
    rows, seeds = [{"prompt_ids": [1, 10, 20 + place]} for place in range(4)], {}
    for seed in (0, 1):
        seen = seeds.setdefault(seed, [])
        trainer_of(model_dir, tmp_path / str(seed), objective("rkl", beta=0.0), rows,
                   rollout=lambda policy, rows, seed, seen=seen: seen.append(seed) or count_of_a(policy, rows, seed),
                   changes={"max_steps": 2, "gradient_accumulation_steps": 2, "seed": seed}).train()  # fmt: skip
    assert len(seeds[0]) == 4 and len({*seeds[0], *seeds[1]}) == 8


def test_evaluations_draw_alike_at_every_step(model_dir, tmp_path):
    rows = [{"prompt_ids": [1, 10, 20 + place]} for place in range(4)]
    trainer = trainer_of(model_dir, tmp_path, objective("rkl"), rows, rollout=count_of_a, eval_dataset=rows,
                         changes={"max_steps": 3, "learning_rate": 0.0, "eval_strategy": "steps", "eval_steps": 1,
                                  "per_device_eval_batch_size": 2})  # fmt: skip
    trainer.train()
    lengths = logged(trainer, "eval_entropy")
    assert len(lengths) == 3 and len(set(lengths)) == 1
    assert len(set(logged(trainer, "entropy"))) == 3


def test_a_kl_weight_needs_something_to_draw_with(model_dir, tmp_path):
    with pytest.raises(ValueError, match="pmle needs completions of the policy: give rollout"):
        trainer_of(model_dir, tmp_path, objective("pmle", kl=0.1))


def token_readings(model_dir, rows, scale=1.0):
    """Of each branch the log-distributions of its tokens [tokens, vocab], and all hidden states there."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
        found = []
        for row in rows:
            for branch in row["branch_ids"]:
                start = len(row["prompt_ids"]) - 1
                output = model(input_ids=torch.tensor([row["prompt_ids"] + branch]), output_hidden_states=True)
                states = [state[0, start:-1] for state in output.hidden_states[1:]]
                found.append((output.logits[0, start:-1].log_softmax(-1), states, torch.tensor(branch)))
    return found


@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_sparse_po_reads_tokens_divergences_and_activations(model_dir, tmp_path, layout):
    rows = encoded(model_dir)
    guide = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.no_grad():
        guide.lm_head.weight.mul_(1.3)
    trainer = trainer_of(model_dir, tmp_path, objective("sparse-po", beta=0.5), rows, ref_model=guide, layout=layout,
                         changes={"max_steps": 1, "per_device_train_batch_size": 5})  # fmt: skip
    trainer.train()
    sides = []
    policy, reference = token_readings(model_dir, rows), token_readings(model_dir, rows, 1.3)
    for (log_p, _, ids), (log_q, states, _) in zip(policy, reference, strict=True):
        means = torch.stack([state.mean(-1) for state in states])
        low, high = means.min(1, keepdim=True).values, means.max(1, keepdim=True).values
        mask = torch.where(high > low, (means - low) / (high - low), torch.ones_like(means)).mean(0)
        ratio = (log_p - log_q).gather(-1, ids[:, None])[:, 0]
        sides.append((mask * (ratio + (log_q.exp() * (log_q - log_p)).sum(-1))).sum())
    margins = torch.stack(sides).view(5, 2)
    wanted = -torch.nn.functional.logsigmoid(0.5 * (margins[:, 0] - margins[:, 1])).mean()
    assert logged(trainer) == [pytest.approx(float(wanted), rel=1e-4)]


def test_unlearning_counts_what_is_kept_by_token(model_dir, tmp_path):
    forget = [row | {"branch_ids": row["branch_ids"][:1]} for row in encoded(model_dir)]
    keep = [{"prompt_ids": [1, 9, 9], "branch_ids": [[7, 8, 2]]}, {"prompt_ids": [1, 5], "branch_ids": [[6]]}]
    options = {"retain_dataset": keep, "changes": {"max_steps": 1, "per_device_train_batch_size": 5}}
    gd = trainer_of(model_dir, tmp_path / "gd", objective("npo-gd", retain_weight=0.5), forget, **options)
    gd.train()
    nll = -tree_logps(model_dir, keep)[[0, 1, 0, 1, 0]].sum() / (3 * 3 + 2 * 1)
    assert logged(gd) == [pytest.approx(20 * math.log(2) + 0.5 * float(nll), rel=1e-5)]
    guide = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with torch.no_grad():
        guide.lm_head.weight.mul_(1.3)
    forgotten = tree_logps(model_dir, forget)[:, 0]
    with torch.no_grad():
        known = branch_logps(guide, collate(forget, "padded", pad=0))
    kl = trainer_of(model_dir, tmp_path / "kl", objective("npo-kl"), forget, ref_model=guide, **options)
    kl.train()
    pairs = zip(token_readings(model_dir, keep), token_readings(model_dir, keep, 1.3), strict=True)
    sums = [float((log_q.exp() * (log_q - log_p)).sum()) for (log_p, _, _), (log_q, _, _) in pairs]
    npo = 20 * torch.nn.functional.softplus(0.1 * (forgotten - known)).mean()
    assert logged(kl) == [pytest.approx(float(npo) + (3 * sums[0] + 2 * sums[1]) / 11, rel=1e-4)]
    with pytest.raises(ValueError, match="npo-gd needs rows of what is to be kept: give retain_dataset"):
        trainer_of(model_dir, tmp_path, "npo-gd", forget)


def test_the_entropy_of_single_tokens_can_be_chosen(model_dir, tmp_path):
    rows = [{"prompt_ids": [1, 10, 20 + place]} for place in range(3)]
    drawn = []
    trainer = trainer_of(model_dir, tmp_path, objective("rkl-token", gamma=0.3, beta=0.0), rows,
                         rollout=lambda *given: drawn.extend(count_of_a(*given)) or drawn,
                         changes=ONE_STEP | {"per_device_train_batch_size": 3})  # fmt: skip
    trainer.train()
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    total = 0.0
    for row in drawn:
        rewards = torch.tensor(row["rewards"])
        for branch, reward, place in zip(row["branch_ids"], rewards, range(4), strict=True):
            ids = torch.tensor([row["prompt_ids"] + branch])
            tokens = model(input_ids=ids).logits[0, 2:-1].log_softmax(-1).gather(-1, ids[0, 3:, None])[:, 0]
            others = (rewards.sum() - rewards[place]) / 3
            total = total - (reward - others) * tokens.sum() + 0.3 * (tokens.detach() * tokens).sum()
    (total / 12).backward()
    for name, tensor in model.named_parameters():
        wanted = tensor.detach() - 1e-3 * tensor.grad
        torch.testing.assert_close(trainer.model.get_parameter(name).detach(), wanted, rtol=1e-4, atol=1e-6, msg=name)


def test_what_is_to_be_forgotten_needs_no_label(model_dir, tmp_path):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS]
    trainer = trainer_of(model_dir, tmp_path, "npo", rows, changes={"max_steps": 1})
    trainer.train()
    assert logged(trainer) == [pytest.approx(20 * math.log(2), rel=1e-6)]


@pytest.mark.parametrize("changes", [{"beta": 0.3}, {"loss_type": "ipo"}, {"sync_ref_model": True}, {"ld_alpha": 0.5}])
def test_arguments_of_trl_without_effect_are_refused(model_dir, tmp_path, changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))}=.* of DPOConfig has no effect here"):
        trainer_of(model_dir, tmp_path, changes=changes)


def test_an_unknown_layout_is_refused(model_dir, tmp_path):
    with pytest.raises(ValueError, match="layout='tree': choose auto, padded, shared, packed"):
        trainer_of(model_dir, tmp_path, layout="tree")


def test_u9_3_a_malformed_row_is_named(model_dir, tmp_path):
    from burnish.errors import DataError

    with pytest.raises(DataError, match=r"train row 2: column 'rejected' is empty"):
        trainer_of(model_dir, tmp_path, rows=[PAIRS[0], {**PAIRS[1], "rejected": ""}])


def test_u11_2_no_telemetry_is_sent(model_dir, tmp_path, monkeypatch):
    import trl.trainer.base_trainer as base

    sent = []
    monkeypatch.setattr(base, "send_telemetry", lambda **told: sent.append(told))
    monkeypatch.delenv("CI", raising=False)
    trainer_of(model_dir, tmp_path, changes={"max_steps": 1}).train()
    assert sent == []


def test_u12_2_the_global_random_state_is_left_alone(model_dir, tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    trainer_of(model_dir, tmp_path)
    assert torch.equal(before, torch.get_rng_state())


def test_u12_1_the_order_of_rows_follows_the_seed_alone(model_dir, tmp_path):
    losses = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        trainer = trainer_of(model_dir, tmp_path / str(global_seed), changes={"per_device_train_batch_size": 1})
        torch.manual_seed(global_seed)
        trainer.train()
        losses.append(logged(trainer, "logps/chosen"))
    assert losses[0] == losses[1] and len(set(losses[0])) == 4


def test_nothing_but_checkpoints_is_written(model_dir, tmp_path):
    trainer_of(model_dir, tmp_path, changes={"save_strategy": "steps", "save_steps": 4}).train()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-4"}
