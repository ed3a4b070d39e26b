"""The demo: tiny trainings on folders of made-up text, what it saves and observes, and what can go wrong."""

import errno
import gzip
import io
import json
import math
import os
import pathlib
import random
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import types
import xml.etree.ElementTree

import pytest
import torch

from edl import cli

EXAMPLE = pathlib.Path(__file__).parents[1] / "examples" / "pretrain"
MODULES = (
    "data",
    "debian",
    "environment",
    "figures",
    "findings",
    "held_out",
    "model",
    "observing",
    "openmp",
    "progress",
    "report",
    "table",
    "text",
    "train",
)
TINY = (
    "--steps 3 --sequence-length 32 --batch-size 6 --layers 1 --hidden-size 16 --intermediate-size 8 --experts 4 "
    "--threads 1 --knock-out-tokens 16"
).split()
ALPHABETS = {"letters": "abcdefghij", "digits": "0123456789", "signs": "+-*/=<>()&"}
KEYS = ["baseline", "divergence", "random", "corrected", "corrected_random"]

np = pytest.importorskip("numpy")
for package in ("jinja2", "matplotlib", "safetensors", "scipy", "tqdm"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def demo():
    """The modules of the example, which import each other by plain names as a script does."""
    sys.path.insert(0, str(EXAMPLE))
    threads = torch.get_num_threads()
    try:
        import train

        torch.set_num_threads(1)
        yield types.SimpleNamespace(**{name: sys.modules[name] for name in MODULES}, main=train.main)
    finally:
        sys.path.remove(str(EXAMPLE))
        torch.set_num_threads(threads)
        for name in MODULES:
            sys.modules.pop(name, None)


def words(alphabet, seed, length=2000):
    """Text of made-up words."""
    draw = random.Random(seed)
    return "\n".join(
        " ".join("".join(draw.choices(alphabet, k=draw.randint(2, 7))) for _ in range(12)) for _ in range(length // 60)
    )


def write_domains(folder):
    """Writes three domains of twelve documents each."""
    for name, alphabet in ALPHABETS.items():
        (folder / name).mkdir(parents=True)
        for number in range(12):
            (folder / name / f"{number}.txt").write_text(words(alphabet, number))


@pytest.fixture
def domains(tmp_path):
    """A folder with three domains of twelve documents each."""
    write_domains(tmp_path / "domains")
    return tmp_path / "domains"


def fails(demo, capsys, *arguments):
    """Runs the demo, which must end with code 1, and returns the one sentence it leaves."""
    assert demo.main([*map(str, arguments), *TINY]) == 1
    complaint = capsys.readouterr().err.strip()
    assert complaint.endswith(".") and "\n" not in complaint
    return complaint


# The whole run


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The whole run as a command: (what it printed, the text's folder, the output's)."""
    folder = tmp_path_factory.mktemp("own")
    domains, output = folder / "domains", folder / "output"
    write_domains(domains)
    (domains / "digits" / "page.html").write_text(f"<nav>menu</nav><p>{words('0123456789', 99)}</p>")
    (domains / "digits" / "packed.txt.gz").write_bytes(gzip.compress(words("0123456789", 98).encode()))
    (domains / "digits" / "picture.png").write_bytes(bytes(range(256)))
    done = subprocess.run(
        [sys.executable, EXAMPLE / "train.py", "--data", domains, "--output", output, *TINY],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return done, domains, output


def test_run_on_own_text(own):
    done, domains, output = own
    assert "digits: " in done.stdout and "(left out: 1 not text)" in done.stdout
    page = (output / "report.html").read_text(encoding="utf-8")
    for title in ("baseline", "expert divergence", "random labels", "bias-corrected", "bias-corrected, random labels"):
        assert title in page and title.split(", ")[-1] in done.stdout
    # Nothing is loaded from outside: pictures hold their own data, links stay on the page.
    assert not re.search(r'(src|srcset|href)="(?!data:|#)|@import|url\(', page)
    assert len(re.findall(r'<source media="[^"]*" srcset="data:[^"]*"><img src="data:', page)) == 4
    assert "<h2>The arms</h2>" in page and "Seed 0" in page and "1 not text" in page
    picture = (output / "heatmaps.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) < 150_000
    numbers = json.loads((output / "results.json").read_text())
    assert list(numbers["arms"]) == KEYS
    for arm in numbers["arms"].values():
        assert all(len(values) == 3 for values in arm["curves"].values())
        assert set(arm["bits_per_byte"]) == set(arm["findings"]["domains"]) == set(ALPHABETS)
        usage = torch.tensor([layer["usage"] for layer in arm["findings"]["layers"]])
        assert usage.shape == (1, 3, 4) and usage.sum(-1).allclose(torch.ones(1, 3))
        assert all(loss > 0 for loss in arm["findings"]["interventions"]["loss"])
    assert numbers["arms"]["baseline"]["loss_seconds"] is None
    assert [(change["earlier"], change["later"]) for change in numbers["changes"]] == [
        ("baseline", "expert divergence"),
        ("random labels", "expert divergence"),
        ("baseline", "random labels"),
        ("baseline", "bias-corrected"),
        ("bias-corrected, random labels", "bias-corrected"),
        ("baseline", "bias-corrected, random labels"),
    ]
    assert str(domains.parent) not in page + (output / "results.json").read_text()


def test_what_the_demo_leaves_is_what_edl_observe_takes(demo, own, tmp_path):
    """The saved model and text go through the command as they are, and the record is the demo's own."""
    _, _, output = own
    model, again = output / "models" / "divergence", tmp_path / "again"
    loader = ["--loader", f"{EXAMPLE / 'model.py'}:load", "--batch-size", str(demo.observing.BATCH)]
    cli.main(["observe", str(model), str(output / "held-out"), *loader, "--output", str(again), "--quiet"])
    theirs = demo.observing.Record.load(again / "record.safetensors")
    ours = demo.observing.Record.load(output / "routing" / "divergence" / "record.safetensors")
    assert set(theirs.domains) == set(ALPHABETS) and len(theirs) > 64
    for name in ("token_ids", "offsets", "labels", "keys", "groups"):
        assert np.array_equal(getattr(theirs, name), getattr(ours, name)), name
    assert np.array_equal(theirs.experts(0), ours.experts(0))
    # Pieces of a document share their group: a third of 14 and of 12 documents is held out.
    assert [len(np.unique(ours.groups[ours.labels == label])) for label in range(3)] == [5, 4, 4]


def test_a_second_run_replaces_the_first_and_names_what_it_dropped(demo, own, tmp_path):
    shutil.copytree(own[1], tmp_path / "domains")
    shutil.copytree(own[2], tmp_path / "output")
    (tmp_path / "output" / "held-out" / "note.txt").write_text("not ours")
    (tmp_path / "domains" / "letters").rename(tmp_path / "domains" / "words")
    (tmp_path / "domains" / "<empty>").mkdir()
    (tmp_path / "domains" / "<empty>" / "line.txt").write_text("only a line")
    arguments = ["--data", str(tmp_path / "domains"), "--output", str(tmp_path / "output"), "--seed", "1", *TINY]
    assert demo.main(arguments) == 0
    numbers = json.loads((tmp_path / "output" / "results.json").read_text())
    assert numbers["arms"]["baseline"]["findings"]["domains"] == ["digits", "signs", "words"]
    assert numbers["left_out"][0].startswith("<empty> has 0 bytes")
    page = (tmp_path / "output" / "report.html").read_text(encoding="utf-8")
    assert "Seed 1" in page and "Left out as a domain: &lt;empty&gt; has 0 bytes" in page
    left = {path.name for path in (tmp_path / "output" / "held-out").iterdir()}
    assert left == {"digits", "signs", "words", "note.txt"}


def test_text_of_another_kind_among_the_pieces_is_a_sentence(demo, untrained, capsys, domains, tmp_path):
    (tmp_path / "output" / "held-out").mkdir(parents=True)
    (tmp_path / "output" / "held-out" / "mine.jsonl").write_text("{}")
    complaint = fails(demo, capsys, "--data", domains, "--output", tmp_path / "output")
    assert "a folder must hold one kind of input" in complaint


def test_same_seed_same_numbers(demo, domains):
    found = demo.data.load(str(domains), "", 32)
    pieces = demo.train.pieces_of(found, 32)

    def run(*arguments):
        results, _ = demo.train.compare(found, pieces, demo.train.parse([*arguments, *TINY]))
        return [
            (one.curves, one.bits_per_byte, [weight.tolist() for weight in one.model.parameters()]) for one in results
        ]

    first = run()
    assert first == run()
    assert first != run("--seed", "1")
    starts = [curves["language_model"][0] for curves, _, _ in first]
    assert starts == [starts[0]] * 5  # same weights, same text


# What can be wrong with text


def test_no_folder(demo, capsys, tmp_path):
    assert "There is no folder" in fails(demo, capsys, "--data", tmp_path / "nowhere", "--output", tmp_path / "output")


def test_empty_folder(demo, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no sub-folders" in fails(demo, capsys, "--data", tmp_path / "empty", "--output", tmp_path / "output")


def test_one_domain(demo, capsys, domains, tmp_path):
    for name in ("digits", "signs"):
        (domains / name).rename(tmp_path / name)
    assert "has 1 sub-folder" in fails(demo, capsys, "--data", domains, "--output", tmp_path / "output")


def test_empty_sub_folders(demo, capsys, tmp_path):
    for name in ("one", "two"):
        (tmp_path / "empty" / name).mkdir(parents=True)
    complaint = fails(demo, capsys, "--data", tmp_path / "empty", "--output", tmp_path / "output")
    assert complaint.startswith("Fewer than two domains have enough text: one has 0 bytes")


def test_too_little_text(demo, capsys, domains, tmp_path):
    for name in ("digits", "signs"):
        for path in (domains / name).iterdir():
            path.write_text("only a line")
    complaint = fails(demo, capsys, "--data", domains, "--output", tmp_path / "output")
    assert "digits has 0 bytes" in complaint and "12 too short" in complaint


def test_domain_without_text_is_left_out(demo, capsys, domains):
    (domains / "empty").mkdir()
    found = demo.data.load(str(domains), "", 32)
    assert [domain.name for domain in found] == ["digits", "letters", "signs"]
    assert "Left out: empty has 0 bytes" in capsys.readouterr().out


def test_undecodable_bytes(demo, domains):
    (domains / "letters" / "latin.txt").write_bytes("é".encode("latin-1") * 400)
    (domains / "letters" / "scratched.txt").write_bytes(words("abcde", 7).encode() + b"\xff\xfe\xfd")
    (domains / "letters" / "torn.gz").write_bytes(gzip.compress(words("abcde", 8).encode())[:-20])
    skipped = {domain.name: domain.skipped for domain in demo.data.load(str(domains), "", 32)}["letters"]
    assert skipped == {"not UTF-8": 1, "undecodable bytes dropped": 3, "damaged gzip": 1}


def test_output_that_cannot_be_written(demo, capsys, domains, tmp_path):
    (tmp_path / "file").write_text("")
    assert "Cannot write" in fails(demo, capsys, "--data", domains, "--output", tmp_path / "file")


@pytest.fixture
def untrained(demo, monkeypatch):
    """Fails where a training begins."""
    monkeypatch.setattr(demo.train, "compare", lambda *arguments: pytest.fail("trained before it looked"))


@pytest.mark.parametrize("name", ["models", "routing", "held-out"])
def test_a_file_in_the_place_of_a_folder_is_found_before_training(demo, untrained, capsys, domains, tmp_path, name):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / name).write_text("mine")
    complaint = fails(demo, capsys, "--data", domains, "--output", tmp_path / "output")
    assert complaint.startswith("Cannot write") and name in complaint
    assert (tmp_path / "output" / name).read_text() == "mine"


@pytest.mark.parametrize("name", ["report.html", "heatmaps.png", "results.json"])
def test_what_stands_in_the_way_of_a_report_is_found_before_training(demo, untrained, capsys, domains, tmp_path, name):
    (tmp_path / "output" / name).mkdir(parents=True)
    complaint = fails(demo, capsys, "--data", domains, "--output", tmp_path / "output")
    assert complaint.startswith("Cannot write") and name in complaint
    assert [path.name for path in (tmp_path / "output").iterdir()] == [name]


def full(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_found_before_training(demo, untrained, capsys, domains, tmp_path, monkeypatch):
    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    complaint = fails(demo, capsys, "--data", domains, "--output", tmp_path / "output")
    assert complaint.startswith("Cannot write") and complaint.endswith("No space left on device.")


def test_a_disk_that_fills_during_training_leaves_the_table_and_the_last_report(
    demo, capsys, domains, tmp_path, monkeypatch
):
    output = tmp_path / "output"
    output.mkdir()
    (output / "report.html").write_text("the last one")
    compare = demo.train.compare

    def fill_the_disk(*arguments):
        monkeypatch.setattr(os, "replace", full)
        return compare(*arguments)

    monkeypatch.setattr(demo.train, "compare", fill_the_disk)
    assert demo.main(["--data", str(domains), "--output", str(output), *TINY]) == 1
    printed = capsys.readouterr()
    assert "held-out bits per byte" in printed.out and "Report:" not in printed.out
    assert "No space left on device." in printed.err and "Traceback" not in printed.err
    assert [path.name for path in output.rglob("*") if path.is_file() and path.suffix != ".txt"] == ["report.html"]
    assert (output / "report.html").read_text() == "the last one"


HOSTILE_NAMES = ("$_$", "$\\foo$", "US$_vs_CA$", "<b>&amp;", "\x1b[31mred\x07\n", "\u202egnp", "{name}%s")


def test_names_are_never_markup(demo, capsys, tmp_path):
    """And there are more domains than a batch holds."""
    for number, name in enumerate(HOSTILE_NAMES):
        (tmp_path / "domains" / name).mkdir(parents=True)
        (tmp_path / "domains" / name / "all.txt").write_text(words("klmnopqrstuv"[number:], number, 4000))
    output = tmp_path / "out\x1b[2Jput"
    assert demo.main(["--data", str(tmp_path / "domains"), "--output", str(output), *TINY]) == 0
    printed = capsys.readouterr()
    for text in (printed.out, printed.err.replace("\x1b[A", "")):  # the progress bar goes up a line
        assert not re.search("[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f\u202e]", text)
    page = (output / "report.html").read_text(encoding="utf-8")
    assert "<b>&amp;<" not in page and "&lt;b&gt;&amp;amp;" in page
    shown = {"$_$", "$\\foo$", "US$_vs_CA$", "<b>&amp;", "\ufffd[31mred\ufffd\ufffd", "\ufffdgnp", "{name}%s"}
    [run] = demo.observing.read_runs([str(output / "routing" / "baseline")], ["$a$ <b>"])
    found = run.findings(0, lambda what, done, total: None)
    assert set(found.domains) == shown
    heat_maps = demo.figures.as_svg(demo.figures.heat_maps([found]))
    labels = {element.text for element in xml.etree.ElementTree.fromstring(heat_maps).iter() if element.text}
    assert shown | {"$a$ <b>"} <= labels


def test_arms_that_are_no_numbers_are_a_sentence(demo, capsys, domains, tmp_path):
    arguments = ["--data", str(domains), "--output", str(tmp_path / "output"), "--learning-rate", "1e20", *TINY]
    assert demo.main(arguments) == 1
    printed = capsys.readouterr()
    assert "bits per byte" in printed.out
    sentence = "The table above is all there is: edl::observe: scores of counted tokens must be numbers (got NaN from "
    assert printed.err.splitlines()[-1].startswith(sentence)


@pytest.mark.parametrize("number", ["nan", "inf", "-1"])
def test_weights_are_finite(demo, capsys, domains, number):
    with pytest.raises(SystemExit):
        demo.main(["--data", str(domains), f"--learning-rate={number}", *TINY])
    assert "must be a finite number of at least 0" in capsys.readouterr().err


def test_a_folder_that_cannot_be_read_is_counted(demo, domains, monkeypatch):
    """As permissions would have it: one folder cannot be listed, of another the files cannot be reached."""
    for name in ("listed", "closed"):
        (domains / "letters" / name).mkdir()
        (domains / "letters" / name / "text.txt").write_text(words("abc", 1))
    scandir, is_file = os.scandir, pathlib.Path.is_file

    def scan(path):
        if pathlib.Path(path).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    def look(path, **options):
        if path.parent.name == "listed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return is_file(path, **options)

    monkeypatch.setattr(os, "scandir", scan)
    monkeypatch.setattr(pathlib.Path, "is_file", look)
    found = {domain.name: domain for domain in demo.data.load(str(domains), "", 32)}
    assert found["letters"].skipped == {"unreadable folder": 1, "unreadable": 1}
    assert sum(found["letters"].documents) in (12, 24)  # held out by document, or the end of each


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_document_has_a_share_of_its_domain_and_no_more(demo, domains, end):
    (domains / "digits" / "primes.txt").write_text("0123456789" * 280_000 + end)
    (domains / "digits" / "more.txt.gz").write_bytes(gzip.compress(b"9876543210" * 4_000_000))  # beyond all limits
    [digits] = [domain for domain in demo.data.load(str(domains), "", 32) if domain.name == "digits"]
    assert digits.skipped["cut after 1 MB"] == 2
    assert digits.train.numel() + sum(map(len, digits.held_out)) < 2 * 2**20 + 100_000


@pytest.mark.parametrize("piece", ['<a x="', "<a x='", "<a ", "</a ", "<!--", "<!", "<?", "<a x=\"'", "<script"])
def test_html_of_unfinished_tags_takes_no_longer_than_its_length(demo, piece):
    """Read a second time from each of them, a page like this took minutes: the test would not end."""
    page = f"<p>{words('abc', 1)}</p>{piece * 500_000}"
    text, _ = demo.text.read_text("page.html", page.encode(), 2**23)
    assert text.startswith(words("abc", 1)[:6]) and len(text) < len(page) / 2


def test_held_out_text_is_not_in_training_text(demo, domains):
    repeated = "this line of more than thirty-two bytes stands in every document of the domain"
    for path in (domains / "letters").iterdir():
        path.write_text(f"{repeated}\n{path.read_text()}")
    for domain in demo.data.load(str(domains), "", 32):
        train, held_out = bytes(domain.train.tolist()), b"\n\n".join(domain.held_out)
        assert domain.split == "by document" and domain.documents == (8, 4) and len(domain.held_out) == 4
        assert 0.3 < len(held_out) / len(train) < 0.7
        lines = [line for line in held_out.split(b"\n") if len(line) >= 32]
        assert lines and not set(lines) & set(train.split(b"\n"))


def test_single_document_is_cut_at_its_end(demo, tmp_path):
    for name, alphabet in ALPHABETS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "all.txt").write_text(words(alphabet, 0, 8000))
    for domain in demo.data.load(str(tmp_path), "", 32):
        assert domain.split == "the last third of every document"
        assert domain.train.numel() == pytest.approx(2 * sum(map(len, domain.held_out)), rel=0.05)


def test_long_names_of_domains_stay_apart(demo, tmp_path):
    for place, alphabet in enumerate(ALPHABETS.values()):
        (tmp_path / f"a name that is longer than a table has room for, {place}").mkdir()
        (tmp_path / f"a name that is longer than a table has room for, {place}" / "all.txt").write_text(
            words(alphabet, 0)
        )
    names = [domain.name for domain in demo.data.load(str(tmp_path), "", 32)]
    assert names == ["a name that is longer t…", "a name that is longer  2", "a name that is longer  3"]


def test_documents_without_a_piece_are_too_little_text(demo, tmp_path):
    for name, alphabet in ALPHABETS.items():
        (tmp_path / name).mkdir()
        for number in range(60):
            (tmp_path / name / f"{number}.txt").write_text(words(alphabet, number, 240))
    with pytest.raises(demo.data.DataError, match="in documents of at most 2.., and more than 3200 of each and 400"):
        demo.data.load(str(tmp_path), "", 400)


# Held-out text


def test_pieces_are_whole_characters_evenly_spaced(demo):
    draw = random.Random(0)
    text = ["".join(draw.choices("aé選🙂\n", k=length)) for length in (3000, 20, 400, 1, 0, 5000)]
    documents = [words.encode() for words in text]
    for wanted in (1, 5, 20, 10**6):
        pieces = demo.held_out.pieces_of(documents, 32, wanted)
        counts = list(map(len, pieces))
        room = [max(len(document) // 128, int(len(document) >= 32)) for document in documents]
        share = max(counts)
        assert counts == [min(share, most) for most in room]  # equally many, or all there are
        assert sum(counts) == sum(room) or sum(counts) >= wanted > sum(min(share - 1, most) for most in room)
        for document, found in zip(documents, pieces):
            places = [document.index(piece) for piece in found]
            assert all(32 <= len(piece) <= 128 and piece.decode() for piece in found)
            assert all(a + len(piece) <= b for a, b, piece in zip(places, places[1:], found))  # none twice
            gaps = np.diff(places)
            assert len(gaps) == 0 or gaps.max() - gaps.min() <= 7
            assert not found or (places[0] < 4 and (len(found) == 1 or places[-1] + 128 > len(document) - 4))


def test_bits_per_byte_and_their_error_over_documents(demo):
    torch.manual_seed(0)
    settings = demo.model.ModelSettings(sequence_length=16, hidden_size=16, intermediate_size=8, experts=4)
    model = demo.model.LanguageModel(settings)
    draw = random.Random(1)
    documents = [[bytes(draw.choices(range(97, 97 + size), k=draw.randint(16, 30))) for _ in range(size)]
                 for size in (1, 5, 0, 30, 3)]  # fmt: skip
    bits, error = demo.held_out.bits_per_byte(model, documents)
    losses = []
    for document in documents:
        losses.append([])
        for piece in document:
            logits = model(torch.tensor([list(piece[:16])]))[0][0].detach().double().numpy()
            chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            losses[-1].append(np.mean([-np.log2(chances[place, piece[place + 1]]) for place in range(15)]))
    mean = np.mean(np.concatenate(losses))
    sums = np.array([np.sum(np.array(each) - mean) for each in losses if each])
    expected = np.sqrt(4 / 3 * (sums**2).sum()) / 39  # of a mean of clusters
    assert bits == pytest.approx(mean, rel=1e-5) and error == pytest.approx(expected, rel=1e-4)
    assert math.isnan(demo.held_out.bits_per_byte(model, documents[:1])[1])


def test_a_saved_model_is_the_same_one(demo, tmp_path):
    torch.manual_seed(0)
    settings = demo.model.ModelSettings(sequence_length=16, layers=3, hidden_size=16, intermediate_size=8, experts=5)
    model = demo.model.LanguageModel(settings)
    demo.model.save(model, tmp_path / "a" / "b")
    loaded, tokenizer = demo.model.load(str(tmp_path / "a" / "b"))
    inputs = torch.randint(0, 256, (2, 16))
    assert tokenizer is None and loaded.config == settings and loaded.config.max_position_embeddings == 16
    assert torch.equal(loaded(inputs)[0], model(inputs)[0])


def test_html_keeps_text_alone(demo):
    page = b"<html><head><title>t</title><style>s</style></head><nav>menu</nav><p>one\n two</p><pre>a\n  b</pre></html>"
    assert demo.text.read_text("page.html", page, 1000) == ("one two\n\na\n  b", 0)


# Downloads, with a stand-in for apt-get and dpkg-deb


@pytest.fixture
def debian_tools(tmp_path, monkeypatch):
    """Puts stand-ins for Debian's tools on the path; a package is a tar file here.

    Returns a function that takes the shell script of `apt-get download` ($NAME is the package, $READY a whole one).
    """
    tools, ready = tmp_path / "tools", tmp_path / "ready"
    tools.mkdir()
    ready.mkdir()
    contents = {
        "anarchism": ("doc/markdown/{}.md", "abcdefghij"),
        "libreoffice-help-zh-cn": ("help/zh-CN/text/{}.html", "天地玄黄宇宙洪荒"),
        "debian-reference-zh-cn": ("share/ch0{}.zh-cn.html", "日月盈昃辰宿列张"),
        "gap-doc": ("doc/ref/chap{}.html", "+-*/=0123456789"),
        "pari-doc": ("doc/usersch{}.tex", "0123456789^_{}$"),
    }
    for name, (path, alphabet) in contents.items():
        with tarfile.open(ready / f"{name}_1%3a2.0_all.deb", "w") as tree:
            for number in range(1, 10):
                body = words(alphabet, number).encode()
                member = tarfile.TarInfo("./" + path.format(number))
                member.size = len(body)
                tree.addfile(member, io.BytesIO(body))
            tree.addfile(tarfile.TarInfo("./doc/copyright"))

    def install(download):
        scripts = {
            # Options come in front of the command, and the name of the package behind it.
            "apt-get": f'READY="{ready}"; for NAME; do :; done; echo "$NAME" >> "{tmp_path}/calls"\n{download}',
            "dpkg-deb": '/usr/bin/env tar -tf "$2" > /dev/null 2>&1 && cat "$2"',
        }
        for name, script in scripts.items():
            (tools / name).write_text(f"#!/bin/sh\n{script}\n")
            (tools / name).chmod(0o755 | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")

    return install


def test_packages_become_domains(demo, debian_tools, tmp_path, capsys):
    debian_tools('cp "$READY/$NAME"_*.deb .')
    found = demo.data.load("debian", tmp_path / "cache", 32)
    assert [domain.name for domain in found] == ["English", "Chinese", "mathematics"]
    assert [source.name for source in found[1].sources] == ["libreoffice-help-zh-cn", "debian-reference-zh-cn"]
    assert found[0].sources[0].version == "1:2.0"
    calls = (tmp_path / "calls").read_text()
    demo.data.load("debian", tmp_path / "cache", 32)
    assert (tmp_path / "calls").read_text() == calls  # the second time nothing is downloaded


def test_old_package_lists(demo, debian_tools, tmp_path, capsys):
    # The system's lists point to packages that are gone; the lists fetched into the cache do better.
    debian_tools(
        'case "$*" in *update) mkdir -p fresh; exit 0;; *Dir::State::Lists*) cp "$READY/$NAME"_*.deb .; exit 0;; esac\n'
        'echo "E: Failed to fetch $NAME 404 Not Found" >&2; exit 100'
    )
    assert len(demo.data.load("debian", tmp_path / "cache", 32)) == 3
    assert capsys.readouterr().out.count("fetching fresh ones") == 1


def test_broken_download(demo, debian_tools, capsys, tmp_path):
    # apt-get leaves half a package and gives up.
    debian_tools('head -c 500 "$READY"/"$NAME"_*.deb > "$NAME"_1_all.deb; echo "E: Connection failed" >&2; exit 100')
    cache = tmp_path / "cache"
    complaint = fails(demo, capsys, "--data", "debian", "--cache", cache, "--output", tmp_path / "output")
    assert complaint.startswith("No text for English: could not get anarchism (Connection failed)")
    assert "DATA=folder" in complaint
    assert not list(cache.glob("*.deb")) and not list(cache.glob("unfinished-*"))


def test_missing_package_is_skipped(demo, debian_tools, capsys, tmp_path):
    debian_tools(
        '[ "$NAME" = pari-doc ] && { echo "E: Unable to locate package pari-doc" >&2; exit 100; }\n'
        'case "$*" in *update) ;; *) cp "$READY/$NAME"_*.deb . ;; esac'
    )
    found = demo.data.load("debian", tmp_path / "cache", 32)
    assert [source.name for source in found[2].sources] == ["gap-doc"]
    assert "pari-doc: skipped (Unable to locate package pari-doc)" in capsys.readouterr().out


def test_damaged_package_is_fetched_again(demo, debian_tools, tmp_path, capsys):
    debian_tools('cp "$READY/$NAME"_*.deb .')
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "gap-doc_1_all.deb").write_bytes(b"half a package")
    assert len(demo.data.load("debian", tmp_path / "cache", 32)) == 3
    assert not (tmp_path / "cache" / "gap-doc_1_all.deb").exists()


def test_without_debian_tools(demo, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(demo.environment, "mathematics", lambda: [("m", words("0123456789+-", 1, 30000).encode())])
    domains = dict(demo.environment.DOMAINS)
    domains["mathematics"] = (*domains["mathematics"][:2], demo.environment.mathematics)
    monkeypatch.setattr(demo.environment, "DOMAINS", domains)
    found = demo.data.load("", tmp_path / "cache", 32)
    assert [domain.name for domain in found] == ["English", "Python", "mathematics"]
    assert "No apt-get and no dpkg-deb here: taking text from the Python environment" in capsys.readouterr().out
    assert "need apt-get and dpkg-deb" in fails(demo, capsys, "--data", "debian", "--output", tmp_path / "output")


def test_docstrings(demo):
    source = b'"""One."""\nclass A:\n    """Two."""\n    def f(self):\n        """Three."""\n'
    assert demo.environment.docstrings(source) == b"One.\n\nTwo.\n\nThree."
    assert demo.environment.docstrings(b"def broken(") == b""


# Order of the text


def batches(demo, number, batch_size=18):
    domain = types.SimpleNamespace(train=torch.arange(5000).to(torch.uint8))
    return demo.data.Batches([domain] * number, 20, batch_size, 16, 0)


@pytest.mark.parametrize("number", [2, 3, 4, 7, 9, 30])
def test_batches_hold_two_sequences_of_a_domain_or_none(demo, number):
    drawn = batches(demo, number)
    for labels, random_labels in zip(drawn.labels, drawn.random_labels):
        counts = torch.bincount(labels, minlength=number)
        assert counts[counts > 0].unique().numel() == 1 and counts.max() >= 2
        assert torch.equal(torch.bincount(random_labels, minlength=number), counts)
    assert set(drawn.labels.flatten().tolist()) == set(range(number))
    assert drawn.sequences(0).shape == (drawn.labels.shape[1], 17)


def test_random_labels_do_not_change_the_order(demo):
    first, second = batches(demo, 3), batches(demo, 3)
    assert torch.equal(first.offsets, second.offsets) and torch.equal(first.random_labels, second.random_labels)
    assert not torch.equal(first.labels, first.random_labels)


# Sentences


def test_findings_follow_the_numbers(demo):
    names = ["one", "two", "three"]

    def result(arm, bits):
        loss_seconds = 0.001 if arm.divergence else math.nan
        return demo.train.Result(arm, None, {}, dict.fromkeys(names, (bits, 0.1)), 0.1, loss_seconds)

    def run(divergence, rise):
        estimate = types.SimpleNamespace(value=divergence, low=divergence - 0.01, high=divergence + 0.01, p=0.001)
        rises = {"own": rise, "others": 0.1, "random": 0.05}
        return types.SimpleNamespace(
            compared=types.SimpleNamespace(whole=estimate),
            beyond_token=types.SimpleNamespace(standardised=types.SimpleNamespace(whole=estimate)),
            interventions=types.SimpleNamespace(**{key: [(value, 0, 1)] * 3 for key, value in rises.items()}),
        )

    def findings(*numbers):
        results = [result(arm, row[0]) for arm, row in zip(demo.train.ARMS, numbers)]
        runs = [run(*row[1:]) for row in numbers]
        table = demo.table.as_text(demo.table.build(results, runs), [arm.title for arm in demo.train.ARMS])
        assert "2.500 ± 0.100" in table and f"{1.4427 * numbers[0][2]:+.3f}" in table
        assert f"{numbers[0][1] - 0.01:.4f} to {numbers[0][1] + 0.01:.4f}" in table
        return " ".join(demo.findings.write(results, runs))

    hoped = findings((2.5, 0.1, 0.2), (2.3, 0.5, 0.8), (2.55, 0.1, 0.2), (2.5, 0.5, 0.8), (2.5, 0.1, 0.2))
    assert "Better than it: expert divergence (-0.20)" in hoped and "takes true labels to raise it" in hoped
    assert "true labels made the experts more specialised" in hoped
    feared = findings((2.5, 0.1, 0.2), (2.9, 0.5, 0.5), (2.9, 0.5, 0.8), (2.5, 0.1, 0.2), (2.5, 0.1, 0.2))
    assert "Worse than it: expert divergence (+0.40) and random labels (+0.40)" in feared
    assert "100 % of the rise with true labels" in feared and "no proof that the labels mattered" in feared
    assert "random labels made the experts more specialised" in feared
    nothing = findings(*[(2.5, 0.1, 0.0)] * 5)
    assert "did not raise it clearly" in nothing and "Not told apart" in nothing


def test_a_run_that_could_not_be_observed_has_its_losses(demo):
    results = [demo.train.Result(arm, None, {}, {"one": (2.5, math.nan)}, 0.1, math.nan) for arm in demo.train.ARMS[:1]]
    table = demo.table.as_text(demo.table.build(results, []), ["baseline"])
    assert "2.500 ± –" in table and "divergence" not in table


def test_a_difference_that_may_be_chance_has_no_interval(demo):
    chance = types.SimpleNamespace(value=0.001, low=math.nan, high=0.002, p=0.4)
    untested = types.SimpleNamespace(value=0.001, low=math.nan, high=math.nan, p=math.nan)
    assert demo.table._estimated([chance, untested, None]) == [
        ("mean, corrected", ["0.0010", "0.0010", "–"]),
        ("95 % interval", ["chance", "–", "–"]),
        ("p", ["0.400", "–", "–"]),
    ]
