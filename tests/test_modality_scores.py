"""Scores of modality by Gaussians of hidden states: their values, when they move, and over ranks."""

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from scipy import special, stats
from tolerances import assert_close, tolerance

import edl
from edl.objectives import ModalityMutualInformation, Objectives

T, H, M = 60, 5, 3
EXACT = tolerance(torch.float64, 64)


def tokens(seed=0, num=T):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, M, (num,), generator=generator)
    spread = torch.tensor([0.5, 1.0, 2.0, 1.0])[ids].unsqueeze(1)  # the last is that of -1
    hidden = torch.randn(num, H, generator=generator, dtype=torch.float64) * spread + ids.unsqueeze(1)
    return hidden, ids


def made(**options):
    return edl.GaussianModalityScores(M, H, **options).double()


def moved(scores, *batches):
    for hidden, ids in batches:
        scores.observe(hidden, ids)
    scores.step()
    return scores


def statistics(hidden, ids):
    each = [hidden[ids == m].numpy() for m in range(M)]
    return np.stack([x.mean(0) for x in each]), np.stack([x.var(0) for x in each])


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_scores_are_the_likelihoods_of_gaussians(temperature):
    hidden, ids = tokens()
    scores = moved(made(temperature=temperature), (hidden, ids))
    means, variances = statistics(hidden, ids)
    assert_close(scores.means, torch.from_numpy(means), EXACT)
    assert_close(scores.variances, torch.from_numpy(variances), EXACT)
    deviations = np.sqrt(variances + 1e-6)
    logs = stats.norm.logpdf(hidden.numpy()[:, None], means, deviations).sum(-1)
    expected = special.softmax(logs / (H / 2 if temperature is None else temperature), axis=1)
    found = scores(hidden.view(6, 10, H))
    assert found.shape == (6, 10, M) and found.dtype == torch.float64 and not found.requires_grad
    assert_close(found.flatten(0, 1), torch.from_numpy(expected), EXACT)


def test_averages_move_by_steps_over_all_micro_batches():
    batches = [tokens(seed, num=seed * 10) for seed in (2, 3, 4)]
    scores = moved(made(decay=0.9), *batches[:2])
    whole = [torch.cat(parts) for parts in zip(*batches[:2])]
    first = statistics(*whole)
    assert_close(scores.means, torch.from_numpy(first[0]), EXACT)
    moved(scores, batches[2])
    second = statistics(*batches[2])
    for found, before, now in zip((scores.means, scores.variances), first, second):
        assert_close(found, torch.from_numpy(0.9 * before + 0.1 * now), EXACT)
    before = scores.state_dict()
    assert set(before) == {"means", "variances", "is_known"}
    scores.step()  # of no token
    again = made()
    again.load_state_dict(before)
    hidden = batches[0][0]
    assert torch.equal(again(hidden), scores(hidden))


def test_a_forward_pass_changes_nothing():
    scores, (hidden, ids) = moved(made(), tokens()), tokens(1)
    before = copy.deepcopy(scores)
    assert torch.equal(scores(hidden), scores(hidden))
    for name, buffer in scores.named_buffers():
        assert torch.equal(buffer, before.get_buffer(name)), name
    scores.observe(hidden, ids)
    assert torch.equal(scores(hidden), before(hidden))  # until the step


def test_until_all_modalities_were_seen_scores_are_even():
    hidden, ids = tokens()
    scores = moved(made(), (hidden, ids.clamp(max=1)))
    assert scores(hidden).eq(1 / M).all() and scores.is_known.tolist() == [True, True, False]
    logits = torch.randn(T, 8, dtype=torch.float64, requires_grad=True)
    objectives = Objectives({"apart": (ModalityMutualInformation(M, bins=4), 1.0)})
    total, _ = objectives(logits, modality_ids=scores(hidden))
    assert abs(total) < 1e-12
    seen = moved(scores, (hidden, ids))
    total, _ = objectives(logits, modality_ids=seen(hidden))
    total.backward()
    assert total < -1e-4 and logits.grad.abs().max() > 0


def test_what_does_not_count_may_be_anything():
    hidden, ids = tokens()
    hostile = hidden.clone()
    hostile[ids == -1] = torch.nan
    kept = ids >= 0
    first, second = moved(made(), (hostile, ids)), moved(made(), (hidden[kept], ids[kept]))
    assert_close(first.means, second.means, EXACT)
    assert_close(first.variances, second.variances, EXACT)
    far = moved(made(), (hidden + 1e6, ids))
    assert_close(far.variances, second.variances, 1e-3)  # float64 cancels 12 of its 16 digits


def test_no_cast_of_a_model_makes_averages_coarse():
    scores = moved(edl.GaussianModalityScores(M, H), tokens())
    before = scores.means.clone()
    scores.bfloat16()
    assert scores.means.dtype == torch.float32 and torch.equal(scores.means, before)
    found = scores(tokens(1)[0].bfloat16())
    assert found.dtype == torch.float32 and found.isfinite().all()
    assert scores.to("meta").means.is_meta


def of_one_rank(*_):
    rank = dist.get_rank()
    hidden, ids = tokens()
    part = slice(0, 20) if rank == 0 else slice(20, T)
    scores = moved(made(group=dist.group.WORLD), (hidden[part], ids[part]))
    copy.deepcopy(scores)
    whole = moved(made(), (hidden, ids))
    assert_close(scores.means, whole.means, EXACT)
    assert_close(scores.variances, whole.variances, EXACT)


def test_ranks_move_alike():
    on_ranks(2, of_one_rank)


HIDDEN, IDS = tokens()
REFUSALS = {
    "num_modalities must be at least 2 ": lambda: edl.GaussianModalityScores(1, H),
    "decay must be in [0, 1) (got 1.0)": lambda: edl.GaussianModalityScores(M, H, decay=1.0),
    "temperature must be finite and above 0 (got 0)": lambda: edl.GaussianModalityScores(M, H, temperature=0),
    "eps must be finite and above 0 (got inf)": lambda: edl.GaussianModalityScores(M, H, eps=float("inf")),
    "hidden must be floating-point and have the shape [..., 5] (got torch.float64 [60, 4])": lambda: made()(
        HIDDEN[:, 1:]
    ),
    "hidden must be floating-point and have the shape [..., 5] (got torch.int64 [60])": lambda: made()(IDS),
    "modality_ids must be int32 or int64 and have the shape [60] (got torch.int64 [59])": lambda: made().observe(
        HIDDEN, IDS[1:]
    ),
    "modality_ids must be at least -1 and below 3 (got 7)": lambda: made().observe(HIDDEN, IDS + 8 * (IDS < 0)),
}


@pytest.mark.parametrize("sentence", REFUSALS)
def test_refused_with_a_sentence(sentence):
    with pytest.raises((ValueError, IndexError)) as error:
        REFUSALS[sentence]()
    assert str(error.value).startswith(f"edl::GaussianModalityScores: {sentence}")
