"""Made-up findings of runs that nobody trained: what a page shows, of any size.

python tests/report/synthetic_findings.py FOLDER        # pages to look at
"""

import dataclasses
import itertools
import pathlib
import sys

import numpy as np

from edl.diagnostics.findings import BeyondToken, Change, Comparison, Course, Estimate, Example, Findings, LayerFindings
from edl.diagnostics.layers import LayerFacts

NAMES = "code,law,mathematics,medicine,news,recipes,forums,poetry,patents,chat".split(",")
WORDS = "the of return \n def ( { patient court , theorem sugar said ### 选择 über 🙂 0 therefore <b>".split(" ")


def findings(
    layers=6,
    experts=16,
    domains=5,
    *,
    names=None,
    title="run",
    record=True,
    strength=1.0,
    tokens_listed=8,
    vocabulary=20,
    seed=0,
) -> Findings:
    """A run whose experts specialise more in the middle of the model."""
    random = np.random.default_rng(seed)
    names = list(names or itertools.islice(domain_names(), domains))
    D, E, L = len(names), experts, layers
    depth = np.sin(np.linspace(0.3, 2.9, L)) * strength
    usage = np.stack([usage_of(random, D, E, 1.2 * each) for each in depth])
    pairs = np.triu_indices(D, 1)
    plain = divergences(usage, pairs)
    tokens = random.integers(200_000, 400_000, D)
    load = np.einsum("d,lde->le", tokens / tokens.sum(), usage)
    mean = usage.mean(1)
    information = entropy(mean) - entropy(usage).mean(1)
    rest = entropy(usage).mean(1)
    return Findings(
        title=title,
        facts={"model": "made up", "text": "none", "seed": str(seed)},
        domains=names,
        documents=np.full(D, 64 if record else 0),
        tokens=tokens,
        layers=[layer(random, place, usage[place], record, tokens_listed, vocabulary, strength) for place in range(L)],
        load_violation=load.max(1) * E - 1,
        dead=[[int(each) for each in np.flatnonzero(row == 0)] for row in load],
        coverage=(np.sort(usage)[..., ::-1].cumsum(-1) < 0.9).sum(-1) + 1,
        overlap=np.minimum(usage[:, pairs[0]], usage[:, pairs[1]]).sum(-1),
        information=information,
        decomposition=np.stack([entropy(mean), information, 0.2 * rest, 0.8 * rest], 1) * (1 if record else np.nan),
        divergence=plain,
        compared=comparison(random, plain, 0.95) if record else None,
        beyond_token=beyond_token(random, plain) if record else None,
        token_texts={token: text_of(token) for token in range(vocabulary)} if record else {},
        course=course(random, information, load.max(1) * E - 1),
        notes=["Made up: nothing was trained."],
    )


def text_of(token):
    """The text of a made-up token."""
    return WORDS[token] if token < len(WORDS) else f" piece{token:x}"


def domain_names():
    """Names without end."""
    yield from NAMES
    for number in itertools.count(len(NAMES)):
        yield f"{NAMES[number % len(NAMES)]} {number // len(NAMES) + 1}"


def usage_of(random, D, E, strength):
    """[D, E] shares; an expert in the middle is used by nobody where there are several."""
    logits = random.normal(0, 0.5, E) + random.normal(0, 0.15, (D, E))
    logits += strength * 2 * (np.arange(E) * D // E == np.arange(D)[:, None]) * random.uniform(0.3, 1, (1, E))
    shares = np.exp(logits)
    if E > 8 and random.random() < 0.2:
        shares[:, E // 2] = 0
    return shares / shares.sum(1, keepdims=True)


def entropy(shares):
    """Nats, over the last dimension."""
    return -(shares * np.log(np.where(shares > 0, shares, 1))).sum(-1)


def divergences(usage, pairs):
    """[L, P] Jensen-Shannon divergences."""
    usage = usage.astype(np.float32)
    one, other = usage[:, pairs[0]], usage[:, pairs[1]]
    return entropy((one + other) / 2) - (entropy(one) + entropy(other)) / 2


def estimate(value, p=0.001) -> Estimate:
    """A number with an interval of a tenth, or what is not told from chance."""
    return Estimate(value, 0.9 * value, 1.1 * value, p) if p <= 0.05 else Estimate(value, np.nan, 2 * value, p)


def comparison(random, plain, share) -> Comparison:
    """A part of the divergences; weak ones are not told from chance."""
    corrected = share * plain - 0.0005
    layer = corrected.mean(1) if corrected.size else np.full(len(plain), np.nan)
    is_weak = layer < 0.01
    p = np.where(corrected < 0.004, random.uniform(0.06, 1, corrected.shape), 0.001)
    value = float(layer.mean())
    return Comparison(
        whole=estimate(value, 0.001 if value > 0.003 else 0.4),
        layer_value=layer,
        layer_low=np.where(is_weak, np.nan, 0.88 * layer),
        layer_high=np.where(is_weak, np.abs(layer) + 0.01, 1.12 * layer),
        layer_p=np.where(is_weak, 0.3, 0.001),
        plain=plain,
        corrected=corrected,
        p=p,
    )


def beyond_token(random, plain) -> BeyondToken:
    """Half of the divergences are the token's."""
    return BeyondToken(
        standardised=comparison(random, plain, 0.4),
        composition=0.5 * plain,
        same_token=0.35 * plain,
        covered=random.uniform(0.5, 0.9, plain.shape[1]),
    )


def layer(random, place, usage, record, tokens_listed, vocabulary, strength) -> LayerFindings:
    """One layer of a run."""
    D, E = usage.shape
    together = random.integers(0, 400, (E, E))
    together = together + together.T
    np.fill_diagonal(together, 4000)
    lift = np.abs(np.log2(np.maximum(usage, 1e-9) / np.maximum(usage.mean(0), 1e-9)))
    unknown = np.full(D, np.nan)
    of_rank = [(100 * (tokens_listed - rank), 9 / (rank + 1)) for rank in range(tokens_listed)]
    tokens = random.integers(0, vocabulary, (E, tokens_listed)).tolist()
    tops = [[(token, *values) for token, values in zip(row, of_rank)] for row in tokens]
    return LayerFindings(
        facts=LayerFacts(place + 1, f"model.layers.{place + 1}.mlp.gate", E, min(E, 2)),
        usage=usage,
        is_certain=lift > 0.45 / max(strength, 0.1) if record else None,
        coactivation=together,
        token_entropy=random.uniform(0.8, 1, D) * np.log(E),
        margin=random.uniform(0.02, 0.05, D),
        document_entropy=random.uniform(0.7, 0.8, D) * np.log(E) if record else unknown,
        document_overlap=np.array([0.7, 0.5]) if record else np.full(2, np.nan),
        top_tokens=tops if record else [],
    )


def course(random, information, violation) -> Course:
    """Nine snapshots on the way to the run's measures."""
    way = 1 - np.exp(-np.linspace(0, 4, 9))[:, None]
    return Course(
        steps=np.arange(9) * 500,
        information=way * information + 0.001,
        max_violation=violation + (1 - way) * 3,
        dead=np.round((1 - way) * random.uniform(0, 4, len(information))),
        token_entropy=2.0 - 0.6 * way + random.normal(0, 0.02, (9, len(information))),
    )


def examples(run, count=3, length=60, seed=0):
    """The run with beginnings of made-up documents."""
    random = np.random.default_rng(seed)
    shown = []
    for number in range(count):
        domain = number % len(run.domains)
        tokens = [WORDS[each] + " " for each in random.integers(0, len(WORDS), length)]
        experts = [random.choice(each.usage.shape[1], length, p=each.usage[domain]) for each in run.layers]
        shown.append(Example(domain, tokens, np.stack(experts)))
    return dataclasses.replace(run, examples=shown)


def change(earlier, later) -> Change:
    """What training changed between two runs."""
    difference = np.asarray(later.information) - np.asarray(earlier.information)
    return Change(
        earlier=earlier.title,
        later=later.title,
        paired=64 * len(later.domains),
        information=estimate(float(difference.mean())),
        standardised=estimate(float(difference.mean()) / 3, 0.2),
        layers=[each.facts.number for each in later.layers],
        layer_information=difference,
        layer_saturation=np.linspace(0.5, 0.8, len(difference)),
        note="One seed each: another seed may differ by as much.",
    )


def unknown(run):
    """The run with NaN wherever there may be one."""

    def blank(value):
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            return np.full_like(value, np.nan)
        if isinstance(value, float):
            return np.nan
        if dataclasses.is_dataclass(value):
            changed = {field.name: blank(getattr(value, field.name)) for field in dataclasses.fields(value)}
            return dataclasses.replace(value, **changed)
        return [blank(each) for each in value] if isinstance(value, list) else value

    return blank(run)


def large() -> Findings:
    """As large as a page must open in two seconds: top tokens of a vocabulary, too."""
    return findings(64, 256, 49, title="large", vocabulary=50_000)


def main(folder):
    """Writes pages to look at."""
    from edl.report.page import write_page

    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    usual = examples(findings(12, 64, 10, title="divergence 1e-2"))
    before = findings(12, 64, 10, title="baseline", strength=0.25, seed=1)
    write_page([usual], folder / "usual.html")
    write_page([before, usual], folder / "two.html", [change(before, usual)])
    write_page([large()], folder / "large.html")
    write_page([findings(2, 8, 3, title="small", record=False)], folder / "small.html")


if __name__ == "__main__":
    main(sys.argv[1])
