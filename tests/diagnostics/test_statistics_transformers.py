"""Statistics of models of transformers are those of what their routers themselves return, in a plain loop and in the
Trainer, on one process and on several."""

import copy
import json

import pytest
import torch
from ranks import on_ranks
from tolerances import assert_close

import edl
from edl.objectives import LoadBalancing, Objectives
from edl.routing import Observation

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("datasets")

from test_transformers_trainer import (
    PRECISION,
    EDTrainer,
    Gradients,
    arguments,
    assert_steps,
    be_a_rank_of_torchrun,
    make_dataset,
    seeded_model,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer
from transformers_models import CONFIGS, VOCABULARY, make_model, routers_of

from edl.integrations.transformers import RoutingStatisticsCallback, attach

NAMES = ["code", "news", "prose"]
LABELS = torch.tensor([0, 1, 2, 0, -1, 1])
MASK = torch.ones(6, 8, dtype=torch.int64)
MASK[0, :3] = MASK[1, 5:] = MASK[4, 1:] = 0


def make_tokens():
    return torch.randint(3, VOCABULARY, (6, 8), generator=torch.Generator().manual_seed(3))


class Outputs:
    """What the routers return themselves."""

    def __init__(self, model):
        self.layers = []
        self.hooks = [
            router.register_forward_hook(lambda router, args, output: self.layers.append(output))
            for router in routers_of(model).values()
        ]

    def statistics(self, labels=LABELS, mask=MASK, scores="softmax"):
        """Of each forward pass that ran with these labels."""
        wanted = edl.RoutingStatistics(NAMES, scores)
        observed = [Observation(logits.detach(), experts=experts) for logits, _, experts in self.layers]
        wanted.update(observed, labels, attention_mask=mask)
        for hook in self.hooks:
            hook.remove()
        return wanted


def assert_same(found, wanted, relative=PRECISION):
    assert len(found.sums) == len(wanted.sums) > 0
    for sums, expected in zip(
        (found.sums[n] for n in sorted(found.sums)), (wanted.sums[n] for n in sorted(wanted.sums))
    ):
        for name, value in expected._asdict().items():
            is_count = name in ("choices", "tokens", "coactivation")
            assert_close(getattr(sums, name), value.double(), 0.0 if is_count else relative)
        assert sums.tokens.sum() > 0


def is_biased(model):
    """Biases that make a router choose others than the highest scores."""
    for router in routers_of(model).values():
        bias = getattr(router, "e_score_correction_bias", None)
        if bias is not None:
            bias.copy_(torch.linspace(-3, 3, len(bias)))
            return True
    return False


@pytest.mark.parametrize("family", [family for family in CONFIGS if family != "llama4"])
def test_every_family_counts_what_its_routers_chose(family):
    model = make_model(family)
    biased = is_biased(model)
    scores = "sigmoid" if family == "deepseek_v3" else "softmax"
    statistics = edl.RoutingStatistics(NAMES, scores)
    outputs = Outputs(model)
    handle = attach(model, Objectives({}, statistics=statistics))
    loss = model(input_ids=make_tokens(), attention_mask=MASK).logits.mean() + handle.loss(LABELS, MASK)
    loss.backward()
    wanted = outputs.statistics(scores=scores)
    assert_same(statistics, wanted, 0.0)
    assert [facts.number for facts in statistics.layers] == ([1, 2] if family == "deepseek_v3" else [0, 1])
    assert all(facts.name.startswith(f"layers.{facts.number}.") for facts in statistics.layers)
    if biased:
        logits, _, experts = outputs.layers[0]
        assert not torch.equal(experts.sort(1).values, logits.topk(2, dim=1).indices.sort(1).values)


def test_choices_of_llama_4_are_the_highest_scores_where_somebody_says_so():
    model = make_model("llama4")
    handle = attach(model, Objectives({}, statistics=edl.RoutingStatistics(NAMES)))
    model(input_ids=make_tokens())
    with pytest.raises(ValueError, match=r"^edl::RoutingStatistics: layer 0 must tell its choices, experts; where"):
        handle.loss(LABELS)
    statistics = edl.RoutingStatistics(NAMES, top_k=model.config.num_experts_per_tok)
    handle = attach(model, Objectives({}, statistics=statistics))
    chosen = []
    for router in routers_of(model).values():
        router.register_forward_hook(lambda router, args, output: chosen.append((output[0] > 0).sum(0)))
    model(input_ids=make_tokens())
    handle.loss(torch.zeros(6, dtype=torch.long))
    assert [sums.choices.sum(0).tolist() for _, sums in sorted(statistics.sums.items())] == [x.tolist() for x in chosen]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe"])
def test_layers_of_edl_in_the_place_of_blocks_count_alike(family):
    model = make_model(family)
    replaced = copy.deepcopy(model)
    for decoder in replaced.model.layers:
        decoder.mlp = edl.MoELayer.from_transformers(decoder.mlp, return_routing=False)
    found = []
    for each in (model, replaced):
        statistics = edl.RoutingStatistics(NAMES)
        handle = attach(each, Objectives({}, statistics=statistics))
        each(input_ids=make_tokens(), attention_mask=MASK)
        handle.loss(LABELS, MASK)
        found.append(statistics)
    assert_same(found[1], found[0])
    assert [facts.number for facts in found[0].layers] == [facts.number for facts in found[1].layers]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_passes_count_once(use_reentrant):
    model = make_model("mixtral")
    outputs = Outputs(model)
    model(input_ids=make_tokens())
    wanted = outputs.statistics()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    statistics = edl.RoutingStatistics(NAMES)
    handle = attach(model, Objectives({}, statistics=statistics))
    (model(input_ids=make_tokens()).logits.mean() + handle.loss(LABELS, MASK)).backward()
    assert_same(statistics, wanted, 0.0)


def test_evaluation_counts_apart_and_leaves_training_forwards_alone():
    model = make_model("mixtral")
    of_training, of_evaluation = edl.RoutingStatistics(NAMES), edl.RoutingStatistics(NAMES)
    balance = {"balance": (LoadBalancing(), 1.0)}
    handle = attach(model, Objectives(balance, statistics=of_training, evaluation_statistics=of_evaluation))
    model(input_ids=make_tokens(), attention_mask=MASK)
    model.eval()
    outputs = Outputs(model)
    with torch.inference_mode():
        model(input_ids=make_tokens()[:3])
    handle.observe(LABELS[:3])
    assert_same(of_evaluation, outputs.statistics(LABELS[:3], None), 0.0)
    with pytest.raises(
        ValueError, match=r"^edl::attach: observe\(\) takes the router logits of the last forward in eval"
    ):
        handle.observe(LABELS[:3])
    assert handle.loss(LABELS, MASK) > 0 and int(of_training.sums[0].tokens.sum()) == int(MASK[LABELS >= 0].sum())
    handle.remove()
    model(input_ids=make_tokens())
    with pytest.raises(ValueError, match=r"^edl::attach: observe\(\) takes"):
        handle.observe(LABELS)


def counted_under_fsdp():
    """The sums of two ranks that share a model by FSDP."""
    torch.manual_seed(0)
    model = make_model("mixtral", torch.float64)
    statistics = edl.RoutingStatistics(NAMES)
    mesh = init_device_mesh("cpu", (2,))
    for part in (*(layer.mlp.experts for layer in model.model.layers), *model.model.layers, model):
        fully_shard(part, mesh=mesh)
    handle = attach(model, Objectives({}, statistics=statistics))
    mine = slice(torch.distributed.get_rank(), None, 2)
    loss = model(input_ids=make_tokens()[mine], attention_mask=MASK[mine]).logits.mean()
    (loss + handle.loss(LABELS[mine], MASK[mine])).backward()
    return statistics.reduce(mesh).state_dict()


# ---- Trainer ----


def of_rows(rows, dataset=None):
    """Statistics of these examples, of what the routers of the Trainer's model return."""
    model, dataset = seeded_model(), dataset or make_dataset()
    outputs = Outputs(model)
    with torch.no_grad():
        model(input_ids=torch.tensor(dataset["input_ids"][:])[rows])
    return outputs.statistics(torch.tensor(dataset["domain_ids"][:])[rows], None)


def trained(folder, objectives=None, dataset=None, callback=None, **options):
    """A Trainer after training, and its callback. The learning rate is 0."""
    callback = callback or RoutingStatisticsCallback(
        edl.RoutingStatistics(NAMES), snapshot_steps=2, per_layer=True, per_pair=True
    )
    recorded = Gradients()
    args = arguments(folder, **{"eval_strategy": "no", **options})
    trainer = EDTrainer(
        seeded_model(),
        args,
        train_dataset=make_dataset() if dataset is None else dataset,
        eval_dataset=make_dataset(6),
        objectives=objectives,
        callbacks=[callback, recorded],
    )
    trainer.train()
    trainer.gradients = recorded.steps
    return trainer, callback


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_callback_counts_logs_and_saves_a_training(tmp_path, accumulation):
    trainer, callback = trained(tmp_path, gradient_accumulation_steps=accumulation)
    wanted = of_rows(slice(0, 20))
    assert_same(callback.statistics, wanted)
    loaded = edl.RoutingStatistics.load(tmp_path / "routing_statistics.safetensors")
    assert_same(loaded, wanted)
    assert [snapshot.step for snapshot in loaded.snapshots] == ([2, 4, 5] if accumulation == 1 else [2, 3])
    logged = {entry["step"]: entry for entry in trainer.state.log_history if "moe/cv_mean" in entry}
    assert list(logged) == ([2, 4] if accumulation == 1 else [2])
    for place, entry in enumerate(logged.values()):
        shown = {name: value for name, value in entry.items() if name.startswith("moe/")}
        assert shown == pytest.approx(loaded.measures(True, True, place), rel=1e-6)
        rows = slice(8 * accumulation * place, min(8 * accumulation * (place + 1), 20))
        assert shown == pytest.approx(of_rows(rows).measures(True, True), rel=1e-3, abs=1e-6)
        assert "moe/layer_1/domain_divergence/code-news" in shown and "loss" in entry


def test_statistics_alone_train_as_the_plain_trainer(tmp_path):
    trainer, _ = trained(tmp_path)
    plain = Trainer(
        seeded_model(), arguments(tmp_path), train_dataset=make_dataset(), callbacks=[recorded := Gradients()]
    )
    plain.train()
    assert_steps(trainer.gradients, recorded.steps)
    watched, _ = trained(tmp_path, {"balance": (LoadBalancing(), 0.1)})
    recorded = Gradients()
    bare = EDTrainer(
        seeded_model(),
        arguments(tmp_path),
        train_dataset=make_dataset(),
        objectives={"balance": (LoadBalancing(), 0.1)},
        callbacks=[recorded],
    )
    bare.train()
    assert_steps(watched.gradients, recorded.steps)


def test_two_passes_count_once(tmp_path):
    objectives = {"balance": (LoadBalancing(), 0.1)}
    callback = RoutingStatisticsCallback(edl.RoutingStatistics(NAMES))
    trainer = EDTrainer(
        seeded_model(),
        arguments(tmp_path, gradient_accumulation_steps=2),
        train_dataset=make_dataset(),
        objectives=objectives,
        two_passes=True,
        callbacks=[callback],
    )
    trainer.train()
    assert_same(callback.statistics, of_rows(slice(0, 20)))


def test_evaluation_logs_its_own_tokens(tmp_path):
    trainer, callback = trained(tmp_path, eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=4)
    wanted = of_rows(slice(0, 6), make_dataset(6))
    entries = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in entries] == [2, 4, 5]
    measures = {f"eval_{name}": value for name, value in wanted.measures(True, True).items()}
    for entry in entries:
        assert {name: x for name, x in entry.items() if name.startswith("eval_moe/")} == pytest.approx(
            measures, rel=1e-4
        )
    assert_same(edl.RoutingStatistics.load(tmp_path / "routing_statistics_eval.safetensors"), wanted)
    assert_same(callback.statistics, of_rows(slice(0, 20)))  # which evaluation leaves alone
    assert trainer.evaluate(metric_key_prefix="other")["other_moe/cv_mean"] == entries[0]["eval_moe/cv_mean"]


def test_evaluation_without_labels_is_warned_of_once(tmp_path):
    callback = RoutingStatisticsCallback(edl.RoutingStatistics(NAMES))
    trainer = EDTrainer(
        seeded_model(),
        arguments(tmp_path),
        train_dataset=make_dataset(),
        eval_dataset=make_dataset(6, labels=False),
        callbacks=[callback],
    )
    with pytest.warns(
        UserWarning, match="^edl::EDTrainerMixin: statistics count evaluation batches that have domain_ids"
    ):
        metrics = trainer.evaluate()
    assert "eval_loss" in metrics and not any("moe" in name for name in metrics)
    assert not (tmp_path / "routing_statistics_eval.safetensors").exists()


def test_one_domain_needs_no_labels(tmp_path):
    callback = RoutingStatisticsCallback(edl.RoutingStatistics(["all"]))
    trainer, _ = trained(tmp_path, dataset=make_dataset(labels=False), callback=callback)
    assert int(callback.statistics.sums[0].tokens) == 20 * 8
    assert "eval_moe/cv_mean" in trainer.evaluate()


def test_a_resumed_training_goes_on_with_its_sums(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    _, whole = trained(tmp_path, **options)
    callback = RoutingStatisticsCallback(edl.RoutingStatistics(NAMES), snapshot_steps=2)
    args = arguments(tmp_path, **options)
    trainer = EDTrainer(seeded_model(), args, train_dataset=make_dataset(), callbacks=[callback])
    trainer.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-3")
    assert_same(callback.statistics, whole.statistics)
    steps = [[snapshot.step for snapshot in each.statistics.snapshots] for each in (callback, whole)]
    assert steps == [[2, 4, 5]] * 2
    for place in range(3):
        of_both = [each.statistics.measures(snapshot=place) for each in (callback, whole)]
        assert of_both[0] == pytest.approx(of_both[1], rel=1e-6)
    trainer.train()  # anew
    assert_same(callback.statistics, whole.statistics)


def trained_on_rank(folder):
    be_a_rank_of_torchrun()
    options = {"per_device_train_batch_size": 2, "ddp_backend": "gloo", "save_strategy": "steps", "save_steps": 3}
    trainer, callback = trained(folder, eval_strategy="steps", eval_steps=5, per_device_eval_batch_size=3, **options)
    own = int(callback.statistics.sums[0].tokens.sum())
    again = RoutingStatisticsCallback(edl.RoutingStatistics(NAMES), snapshot_steps=2)
    args = arguments(folder, **options)
    EDTrainer(seeded_model(), args, train_dataset=make_dataset(), callbacks=[again]).train(
        resume_from_checkpoint=f"{folder}/checkpoint-3"
    )
    whole = again.statistics.reduce(torch.distributed.group.WORLD)
    return own, trainer.state.log_history, whole.state_dict()


def on_rank(folder):
    return counted_under_fsdp(), trained_on_rank(folder)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two ranks returned, and the folder of their Trainer; they take long to start."""
    folder = tmp_path_factory.mktemp("ranks")
    return on_ranks(2, on_rank, folder), folder


def test_ranks_of_fsdp_have_the_sums_of_one_process(ranks):
    torch.manual_seed(0)
    model = make_model("mixtral", torch.float64)
    outputs = Outputs(model)
    model(input_ids=make_tokens(), attention_mask=MASK)
    wanted = outputs.statistics()
    for state, _ in ranks[0]:
        found = edl.RoutingStatistics(NAMES)
        found.load_state_dict(state)
        assert_same(found, wanted)


def test_two_processes_count_as_one(ranks, tmp_path):
    of_trainer, folder = [each for _, each in ranks[0]], ranks[1]
    trainer, callback = trained(tmp_path, eval_strategy="steps", eval_steps=5, per_device_eval_batch_size=6)
    wanted = callback.statistics
    assert_same(edl.RoutingStatistics.load(folder / "routing_statistics.safetensors"), wanted)
    assert sum(own for own, _, _ in of_trainer) == int(wanted.sums[0].tokens.sum())
    for _, log, resumed in of_trainer:
        for entry, other in zip(log, trainer.state.log_history, strict=True):
            names = {name for name in {**entry, **other} if "moe/" in name}
            assert {name: entry[name] for name in names} == pytest.approx(
                {name: other[name] for name in names}, rel=1e-4
            )
        again = edl.RoutingStatistics(NAMES)
        again.load_state_dict(resumed)
        assert_same(again, wanted)
    assert any("eval_moe/cv_mean" in json.dumps(entry) for entry in trainer.state.log_history)


def test_what_the_callback_refuses(tmp_path):
    with pytest.raises(ValueError, match="^edl::RoutingStatisticsCallback: statistics must be edl.RoutingStatistics"):
        RoutingStatisticsCallback(3)
    with pytest.raises(ValueError, match="^edl::RoutingStatisticsCallback: snapshot_steps must be at least 1"):
        RoutingStatisticsCallback(edl.RoutingStatistics(2), snapshot_steps=0)
    one, two = (RoutingStatisticsCallback(edl.RoutingStatistics(2)) for _ in range(2))
    with pytest.raises(ValueError, match=r"^edl::EDTrainerMixin: callbacks must hold at most one .* \(got 2\)$"):
        EDTrainer(seeded_model(), arguments(tmp_path), train_dataset=make_dataset(), callbacks=[one, two])
    foreign = RoutingStatisticsCallback(edl.RoutingStatistics(2))
    plain = Trainer(seeded_model(), arguments(tmp_path), train_dataset=make_dataset(), callbacks=[foreign])
    with pytest.raises(
        ValueError, match="^edl::RoutingStatisticsCallback: the Trainer must derive from EDTrainerMixin"
    ):
        plain.train()
