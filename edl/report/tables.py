"""Tables of a page, as text: they stand there without scripts, too."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from edl.diagnostics.extras import require
from edl.diagnostics.findings import Change, Comparison, Findings
from edl.report import packing, summaries, words

# Rows of pairs that the page holds as text; scripts show all of them.
MOST_PAIRS = 30
MOST_EXPERTS = 4
MOST_LISTED = 12


class Column(NamedTuple):
    """A column.

    Attributes:
        title (str): its head.
        meaning (str): what it is, shown where a pointer rests on the head.
        is_number (bool): numbers stand at the right.
    """

    title: str
    meaning: str = ""
    is_number: bool = True


class Cell(NamedTuple):
    """A cell; muted where its number cannot be told from chance."""

    text: str
    is_muted: bool = False


class Table(NamedTuple):
    """A table.

    Attributes:
        key (str): a name for scripts and files.
        caption (str): what it is.
        columns (list of Column): heads; the first column names the row.
        rows (list of lists of Cell): as many cells each.
    """

    key: str
    caption: str
    columns: list[Column]
    rows: list[list[Cell]]


def cells(*texts: str) -> list[Cell]:
    """Plain cells."""
    return [Cell(text) for text in texts]


def layer_numbers(run: Findings) -> list[str]:
    """What layers are called."""
    return [str(layer.facts.number) for layer in run.layers]


def names_of(run: Findings) -> list[str]:
    """What domains are called."""
    return [name or "(no name)" for name in run.domains]


def of_layers(run: Findings) -> Table:
    """Divergences of each layer."""
    columns = [
        Column("Layer"),
        Column("I(E;D)", "nats, what the expert tells of the domain"),
        Column("Raw", "nats, divergence of the domains' choices"),
        Column("95\u00a0% interval"),
        Column("p", "adjusted for the number of layers"),
    ]
    if run.beyond_token is not None:
        columns += [
            Column("Vocabulary", "nats, what a router would show that sees the token alone"),
            Column("Equal tokens", "nats, what is left of it at equal tokens"),
            Column("95\u00a0% interval"),
            Column("p", "adjusted for the number of layers"),
            Column("Same token", "nats, mean divergence of one and the same token id"),
        ]
    plain = summaries.mean_of(run.divergence, 1)
    rows = []
    for place, number in enumerate(layer_numbers(run)):
        row = cells(number, words.number(run.information[place]))
        row += tested(run.compared, place) if run.compared else cells(words.number(plain[place]), "–", "not tested")
        if run.beyond_token is not None:
            row += cells(words.number(summaries.mean_of(run.beyond_token.composition[place])))
            row += tested(run.beyond_token.standardised, place)
            row += cells(words.number(summaries.mean_of(run.beyond_token.same_token[place])))
        rows.append(row)
    return Table("layers", "Divergence of domains by layer, mean over pairs", columns, rows)


def tested(comparison: Comparison, place: int) -> list[Cell]:
    """A layer's value, interval and p."""
    value, p = comparison.layer_value[place], comparison.layer_p[place]
    low, high = comparison.layer_low[place], comparison.layer_high[place]
    if not words.is_known(p):
        return cells(words.number(value), words.interval(low, high), "not tested")
    if words.rejects(p):
        return cells(words.number(value), words.interval(low, high), f"{p:.3f}")
    below = f"chance; below {words.upper(high)}" if words.is_known(high) else "chance"
    return [Cell(words.number(value), True), Cell(below, True), Cell(f"{p:.3f}", True)]


def of_load(run: Findings) -> Table:
    """Load of each layer."""
    columns = [
        Column("Layer"),
        Column("Experts"),
        Column("K", "experts per token"),
        Column("MaxVio", "(busiest expert − mean) / mean"),
        Column("Busiest", "its number"),
        Column("Dead"),
        Column("Which", "numbers of experts that nobody chose", False),
    ]
    np = require("numpy", "page")
    rows = []
    for place, layer in enumerate(run.layers):
        load, dead = summaries.load(run, layer), list(run.dead[place])
        busiest = str(int(np.nanargmax(load))) if np.isfinite(load).any() else "–"
        which = ", ".join(map(str, dead[:MOST_LISTED])) + (" …" if len(dead) > MOST_LISTED else "")
        top_k = str(layer.facts.top_k) if layer.facts.top_k else "–"
        violation = words.number(run.load_violation[place])
        rows.append(
            cells(
                str(layer.facts.number), str(layer.facts.num_experts), top_k, violation, busiest, str(len(dead)), which
            )
        )
    return Table("load", "Load by layer", columns, rows)


def of_domains(run: Findings, strongest: Sequence[Sequence[summaries.Cell]]) -> Table:
    """Which experts for each domain."""
    columns = [
        Column("Domain", "", False),
        Column("Documents"),
        Column("Tokens"),
        Column("Its experts", "of all layers: how many times the mean over domains, share of its choices", False),
    ]
    rows = []
    for domain, name in enumerate(names_of(run)):
        found = [
            f"layer {run.layers[each.layer].facts.number}, expert {each.expert} ({words.times(each.ratio)}, "
            f"{words.percent(each.share)})"
            for each in strongest[domain][:MOST_EXPERTS]
        ]
        rows.append(
            cells(
                name,
                f"{int(run.documents[domain]):,}",
                f"{int(run.tokens[domain]):,}",
                "; ".join(found) or "none beyond chance",
            )
        )
    return Table("domains", "The experts that set a domain apart", columns, rows)


def of_coverage(run: Findings) -> Table:
    """How few experts hold 90 % of each domain's choices."""
    np = require("numpy", "page")
    columns = [
        Column("Domain", "", False),
        Column("Mean", "experts that hold 90 % of its choices"),
        Column("Fewest"),
        Column("in layer"),
        Column("Most"),
        Column("in layer"),
    ]
    coverage, numbers = np.asarray(run.coverage, np.float64), layer_numbers(run)
    coverage = np.where(coverage > 0, coverage, np.nan)
    rows = []
    for domain, name in enumerate(names_of(run)):
        of_layers = coverage[:, domain]
        if not np.isfinite(of_layers).any():
            rows.append(cells(name, *["–"] * 5))
            continue
        least, most = int(np.nanargmin(of_layers)), int(np.nanargmax(of_layers))
        rows.append(
            cells(
                name,
                words.number(summaries.mean_of(of_layers)),
                str(int(of_layers[least])),
                numbers[least],
                str(int(of_layers[most])),
                numbers[most],
            )
        )
    return Table("coverage", "Experts that hold 90\u00a0% of a domain’s choices", columns, rows)


def of_silenced(run: Findings) -> Table:
    """What each domain loses while experts are silent."""
    columns = [
        Column("Domain", "", False),
        Column("Loss", "nats per token, of the model as it is"),
        Column("Without its own", "rise of the loss on its text while its favourite experts are silent"),
        Column("Without random ones", "rise of the loss on its text while as many random experts are silent"),
        Column("Of the others", "rise of the loss on the others' text while its favourite experts are silent"),
        Column("Documents"),
    ]
    cost = run.interventions
    if cost is None:
        return Table("silenced", "", columns, [])
    rows = [
        cells(
            name,
            words.number(cost.loss[place]),
            words.risen(cost.own[place]),
            words.risen(cost.random[place]),
            words.risen(cost.others[place]),
            str(int(cost.documents[place])),
        )
        for place, name in enumerate(names_of(run))
    ]
    return Table("silenced", "Rise of the loss without experts, nats per token", columns, rows)


def of_permuted(run: Findings) -> Table:
    """What is lost while the choices of a layer mean other experts."""
    columns = [Column("Layer"), Column("Rise of the loss", "nats per token, on all text, with its 95 % interval")]
    cost = run.interventions
    rows = (
        []
        if cost is None
        else [cells(number, words.risen(cost.permuted[place])) for place, number in enumerate(layer_numbers(run))]
    )
    return Table("permuted", "Rise of the loss with a layer's experts swapped, nats per token", columns, rows)


def of_tokens(run: Findings, strongest: Sequence[Sequence[summaries.Cell]]) -> Table:
    """What the most specialised experts read."""
    columns = [
        Column("Expert", "", False),
        Column("Domain", "that sets it apart", False),
        Column("Tokens that it reads", "the most for their number first", False),
    ]
    found = sorted((cell for cells in strongest for cell in cells), key=lambda cell: -cell.share * cell.ratio)
    rows: list[list[Cell]] = []
    seen = set()
    for cell in found:
        tops = run.layers[cell.layer].top_tokens
        if (cell.layer, cell.expert) in seen or not len(tops) or len(rows) == MOST_LISTED:
            continue
        seen.add((cell.layer, cell.expert))
        texts = [words.token(run.token_texts.get(token, f"[{token}]")) for token, _, _ in tops[cell.expert][:8]]
        expert = f"layer {run.layers[cell.layer].facts.number}, expert {cell.expert}"
        rows.append(cells(expert, f"{run.domains[cell.domain]} ({words.times(cell.ratio)})", "  ".join(texts)))
    return Table("tokens", "What the most specialised experts read", columns, rows)


def of_pairs(run: Findings) -> Table:
    """Pairs of domains, mean over layers, the furthest apart."""
    control = run.beyond_token
    columns = [Column("Pair", "", False), Column("Raw", "nats, divergence of the choices")]
    values: list[Any] = [summaries.mean_of(summaries.divergence(run), 0)]
    if control is not None:
        columns += [
            Column("Vocabulary", "nats, what a router would show that sees the token alone"),
            Column("Equal tokens", "nats, what is left of it at equal tokens"),
            Column("Same token", "nats, mean divergence of one and the same token id"),
            Column("Covered", "share of the tokens for which the control speaks"),
        ]
        values += [
            summaries.mean_of(each, 0)
            for each in (control.composition, control.standardised.corrected, control.same_token)
        ]
    columns.append(Column("Overlap", "share of choices that both have in common"))
    titles = {"raw": "Raw", "standardised": "Equal tokens"}
    tests = {titles[kind]: comparison for kind, comparison in packing.comparisons(run).items()}
    columns += [
        Column(f"{title}: layers", "in which it is more than chance, adjusted for layers and pairs") for title in tests
    ]
    overlap = summaries.mean_of(run.overlap, 0)
    pairs = summaries.names_of_pairs(run)
    order = sorted(range(len(pairs)), key=lambda pair: -values[0][pair] if words.is_known(values[0][pair]) else 1)
    rows = []
    for pair in order[:MOST_PAIRS]:
        one, other = pairs[pair]
        row = cells(f"{words.name(run.domains[one])} – {words.name(run.domains[other])}")
        row += cells(*[words.number(value[pair]) for value in values])
        row += cells(words.percent(control.covered[pair])) if control is not None else []
        row += cells(words.percent(overlap[pair]))
        row += [layers_found(comparison, pair) for comparison in tests.values()]
        rows.append(row)
    return Table("pairs", "Pairs of domains, mean over layers", columns, rows)


def layers_found(comparison: Comparison, pair: int) -> Cell:
    """In how many layers a pair differs by more than chance."""
    p = [row[pair] for row in comparison.p]
    known = [each for each in p if words.is_known(each)]
    found = sum(words.rejects(each) for each in known)
    return Cell(f"{found} of {len(known)}", found == 0) if known else Cell("not tested", True)


def of_measures(run: Findings) -> Table:
    """What else is measured by layer."""
    columns = [
        Column("Layer"),
        Column("Token entropy", "nats, of a token's scores"),
        Column("Margin", "distance of the K-th score to the next"),
        Column("H(E)", "nats, entropy of the mean routing"),
        Column("I(E;D)", "nats, between domains"),
        Column("Documents", "nats, between documents of a domain"),
        Column("Within", "nats, within a document"),
        Column("Overlap, one domain", "share of choices that two documents of one domain have in common"),
        Column("Overlap, two domains", "the same for documents of two domains"),
    ]
    rows = []
    for place, layer in enumerate(run.layers):
        numbers = [summaries.mean_of(layer.token_entropy), summaries.mean_of(layer.margin), *run.decomposition[place]]
        rows.append(
            cells(str(layer.facts.number), *map(words.number, numbers), *map(words.percent, layer.document_overlap))
        )
    return Table("measures", "Measures by layer", columns, rows)


def of_change(change: Change) -> Table:
    """What differs between two runs in each layer."""
    columns = [
        Column("Layer"),
        Column("I(E;D)", "nats, the later run less the earlier one"),
        Column("Saturation", "share of a token’s choices in the earlier run that the later one makes, too"),
    ]
    values = zip(change.layers, change.layer_information, change.layer_saturation)
    rows = [cells(str(layer), words.number(nats), words.percent(share)) for layer, nats, share in values]
    return Table("change", "Change by layer", columns, rows)


def of_runs(runs: Sequence[Findings]) -> list[tuple[str, list[str]]]:
    """The facts of the runs: name, its value in each."""
    names = list(dict.fromkeys(name for run in runs for name in run.facts))
    return [(name, [run.facts.get(name, "–") for run in runs]) for name in names]
