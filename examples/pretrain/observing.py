"""What the experts of trained models do on held-out text: what `edl observe` does, and what its page shows."""

import pathlib
import shutil

import held_out
import progress

import edl
from edl.corpus import readers
from edl.diagnostics import interventions as interventions_file
from edl.diagnostics import significance
from edl.diagnostics.record import Record
from edl.observe import interventions, models, running
from edl.observe.sample import bytes_of, sample_of
from edl.observe.unfinished import RECORD, STATISTICS, Unfinished
from edl.report.runs import read_runs

LOADER = f"{pathlib.Path(__file__).parent / 'model.py'}:load"
# Documents at a time; only memory depends on it.
BATCH = 16


def sample(folder, sequence_length):
    """Chooses the pieces of held-out text that every model is observed on, as `edl observe` does by default.

    Arguments:
        folder: pathlib.Path of what `held_out.write` has written.
        sequence_length: bytes that the models read.

    Returns:
        edl.observe.sample.Sample.
    """
    size = held_out.size_of(sequence_length)
    return sample_of(readers.shards_of([folder]), bytes_of(size.length), size)


def observe(model, chosen, output, knock_out_tokens, advance):
    """Writes down what a saved model's experts do: statistics, record and what silencing experts costs.

    Arguments:
        model: pathlib.Path of a folder that `model.save` has written.
        chosen: edl.observe.sample.Sample.
        output: pathlib.Path of a folder for the files, in which those of an earlier run are replaced.
        knock_out_tokens: of each domain that are predicted again and again while experts are silent.
        advance: is told how many tokens were read.
    """
    output.mkdir(parents=True, exist_ok=True)
    for name in (STATISTICS, RECORD, interventions_file.FILE):
        (output / name).unlink(missing_ok=True)
    shutil.rmtree(output / "unfinished", ignore_errors=True)
    watched = models.load_own(LOADER, str(model))
    plan, scores = running.plan_of(chosen, BATCH), watched.scores
    run = running.run_of(watched, plan, chosen.domains, [False, scores])
    facts = watched.facts | {"text": held_out.FOLDER, "window": f"{watched.context - 1} bytes", "edl": edl.__version__}
    with Unfinished(output, run) as unfinished:
        running.observe(watched, plan, chosen.domains, unfinished, False, scores, lambda forecast: None, advance)
        unfinished.finish(plan.order, facts, running.texts_in(plan, watched.tokenizer))
    documents = interventions.documents_within(chosen.documents, knock_out_tokens)
    lost = interventions.intervene(watched, documents, Record.load(output / RECORD), 0, advance)
    interventions_file.write_interventions(output / interventions_file.FILE, lost)


def tokens_read(chosen, knock_out_tokens, layers):
    """Returns how many tokens `observe` reads of a model with so many layers."""
    silent = interventions.documents_within(chosen.documents, knock_out_tokens)
    return running.plan_of(chosen, BATCH).num_tokens + interventions.tokens_read(silent, layers)


def observe_all(results, chosen, output, knock_out_tokens):
    """Observes the saved models of all arms.

    Arguments:
        results: list of train.Result.
        chosen: edl.observe.sample.Sample.
        output: pathlib.Path with models/ARM; routing/ARM is written.
        knock_out_tokens: as for `observe`.

    Returns:
        (list of edl.diagnostics.findings.Findings, list of edl.diagnostics.findings.Change).
    """
    arms = [result.arm for result in results]
    total = sum(tokens_read(chosen, knock_out_tokens, result.model.config.layers) for result in results)
    with progress.bar(desc="observing", total=total, unit="token", unit_scale=True) as bar:
        for arm in arms:
            observe(output / "models" / arm.key, chosen, output / "routing" / arm.key, knock_out_tokens, bar.update)
    runs = read_runs([str(output / "routing" / arm.key) for arm in arms], [arm.title for arm in arms])
    with progress.bar(runs, desc="testing", unit="model") as bar:
        found = [run.findings(0, lambda what, done, total: None) for run in bar]
    by_key = {arm.key: run for arm, run in zip(arms, runs)}
    pairs = [(by_key[earlier], by_key[arm.key]) for arm in arms for earlier in arm.compared_with]
    return found, [
        significance.compare_runs(earlier.record, later.record, earlier.title, later.title) for earlier, later in pairs
    ]
