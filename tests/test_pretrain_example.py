"""The demo: tiny trainings on folders of made-up text, its measures on known routings, and what can go wrong."""

import base64
import errno
import gzip
import io
import json
import math
import os
import pathlib
import random
import re
import stat
import subprocess
import sys
import tarfile
import types
import xml.etree.ElementTree

import pytest
import torch

EXAMPLE = pathlib.Path(__file__).parents[1] / "examples" / "pretrain"
MODULES = (
    "data",
    "debian",
    "environment",
    "figures",
    "findings",
    "measures",
    "model",
    "openmp",
    "report",
    "table",
    "text",
    "train",
)
TINY = (
    "--steps 3 --sequence-length 32 --batch-size 6 --layers 1 --hidden-size 16 --intermediate-size 8 --experts 4 "
    "--threads 1"
).split()
ALPHABETS = {"letters": "abcdefghij", "digits": "0123456789", "signs": "+-*/=<>()&"}

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")


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


@pytest.fixture
def domains(tmp_path):
    """A folder with three domains of twelve documents each."""
    folder = tmp_path / "domains"
    for name, alphabet in ALPHABETS.items():
        (folder / name).mkdir(parents=True)
        for number in range(12):
            (folder / name / f"{number}.txt").write_text(words(alphabet, number))
    return folder


def fails(demo, capsys, *arguments):
    """Runs the demo, which must end with code 1, and returns the one sentence it leaves."""
    assert demo.main([*map(str, arguments), *TINY]) == 1
    complaint = capsys.readouterr().err.strip()
    assert complaint.endswith(".") and "\n" not in complaint
    return complaint


# The whole run


def test_run_on_own_text(domains, tmp_path):
    (domains / "digits" / "page.html").write_text(f"<nav>menu</nav><p>{words('0123456789', 99)}</p>")
    (domains / "digits" / "packed.txt.gz").write_bytes(gzip.compress(words("0123456789", 98).encode()))
    (domains / "digits" / "picture.png").write_bytes(bytes(range(256)))
    output = tmp_path / "output"
    done = subprocess.run(
        [sys.executable, EXAMPLE / "train.py", "--data", domains, "--output", output, *TINY],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "digits: " in done.stdout and "(left out: 1 not text)" in done.stdout
    page = (output / "report.html").read_text(encoding="utf-8")
    for title in ("baseline", "expert divergence", "random labels", "bias-corrected", "bias-corrected, random labels"):
        assert title in page and title.split(", ")[-1] in done.stdout
    # Nothing is loaded from outside: no scripts, no links, and pictures hold their own data.
    assert not re.search(r"https?://|<link|<script|@import|url\(", page)
    assert re.findall(r'src="([^:]*):', page) == ["data", "data"]
    assert "seed 0" in page.lower() and "1 not text" in page
    picture = (output / "heatmaps.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) < 150_000
    numbers = json.loads((output / "results.json").read_text())
    assert list(numbers["arms"]) == ["baseline", "divergence", "random", "corrected", "corrected_random"]
    for arm in numbers["arms"].values():
        assert all(len(values) == 3 for values in arm["curves"].values())
        assert torch.tensor(arm["usage"]).sum(-1).allclose(torch.ones(1, 3))
    assert numbers["arms"]["baseline"]["loss_seconds"] is None
    assert str(tmp_path) not in page


def test_same_seed_same_numbers(demo, domains):
    found = demo.data.load(str(domains), "", 32)

    def run(*arguments):
        results, _ = demo.train.compare(found, demo.train.parse([*arguments, *TINY]))
        return [(one.curves, one.measures.bits_per_byte.tolist(), one.measures.rise_own.tolist()) for one in results]

    first = run()
    assert first == run()
    assert first != run("--seed", "1")
    starts = [curves["language_model"][0] for curves, _, _ in first]
    assert starts == [starts[0]] * 5  # same weights, same text


def test_more_domains_than_a_batch_holds(demo, domains, tmp_path):
    for number in range(5):
        (domains / f"letters{number}").mkdir()
        (domains / f"letters{number}" / "all.txt").write_text(words("klmnopqrst"[number:], number, 4000))
    assert demo.main(["--data", str(domains), "--output", str(tmp_path / "output"), *TINY]) == 0
    assert "closest pair" in (tmp_path / "output" / "report.html").read_text(encoding="utf-8")


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
    assert [path.name for path in output.iterdir()] == ["report.html"]
    assert (output / "report.html").read_text() == "the last one"


HOSTILE_NAMES = ("$_$", "$\\foo$", "US$_vs_CA$", "<b>&amp;", "\x1b[31mred\x07\n", "\u202egnp", "{name}%s")


def test_names_are_never_markup(demo, capsys, tmp_path):
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
    [heat_maps, curves] = [base64.b64decode(data) for data in re.findall(r"svg\+xml;base64,([^\"]*)", page)]
    labels = {element.text for element in xml.etree.ElementTree.fromstring(heat_maps).iter() if element.text}
    assert {"$_$", "$\\foo$", "US$_vs_CA$", "<b>&amp;", "\ufffd[31mred\ufffd\ufffd", "\ufffdgnp", "{name}%s"} <= labels
    assert xml.etree.ElementTree.fromstring(curves) is not None


def test_results_are_json_whatever_the_numbers(demo, domains, tmp_path):
    output = tmp_path / "output"
    assert demo.main(["--data", str(domains), "--output", str(output), "--learning-rate", "1e20", *TINY]) == 0

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    numbers = json.loads((output / "results.json").read_text(), parse_constant=refuse)
    assert None in numbers["arms"]["baseline"]["curves"]["language_model"]


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


def test_domains_that_are_dropped_stand_in_the_report(demo, domains, tmp_path):
    (domains / "<empty>").mkdir()
    (domains / "<empty>" / "line.txt").write_text("only a line")
    output = tmp_path / "output"
    assert demo.main(["--data", str(domains), "--output", str(output), *TINY]) == 0
    assert "Left out as a domain: &lt;empty&gt; has 0 bytes" in (output / "report.html").read_text(encoding="utf-8")
    assert json.loads((output / "results.json").read_text())["left_out"][0].startswith("<empty> has 0 bytes")


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_document_has_a_share_of_its_domain_and_no_more(demo, domains, end):
    (domains / "digits" / "primes.txt").write_text("0123456789" * 280_000 + end)
    (domains / "digits" / "more.txt.gz").write_bytes(gzip.compress(b"9876543210" * 4_000_000))  # beyond all limits
    [digits] = [domain for domain in demo.data.load(str(domains), "", 32) if domain.name == "digits"]
    assert digits.skipped["cut after 1 MB"] == 2
    assert digits.train.numel() + digits.held_out.numel() < 2 * 2**20 + 100_000


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
        train, held_out = bytes(domain.train.tolist()), bytes(domain.held_out.tolist())
        assert domain.split == "by document" and domain.documents[1] >= 1
        assert 0.05 < len(held_out) / len(train) < 0.2
        lines = [line for line in held_out.split(b"\n") if len(line) >= 32]
        assert lines and not set(lines) & set(train.split(b"\n"))


def test_single_document_is_cut_at_its_end(demo, tmp_path):
    for name, alphabet in ALPHABETS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "all.txt").write_text(words(alphabet, 0, 8000))
    for domain in demo.data.load(str(tmp_path), "", 32):
        assert domain.split == "the last tenth of every document"
        assert domain.train.numel() == pytest.approx(9 * domain.held_out.numel(), rel=0.05)


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


# Measures


def test_usage_of_disjoint_experts(demo):
    labels = torch.arange(3).repeat_interleave(4)
    experts = torch.stack((2 * labels, 2 * labels + 1), dim=-1).repeat_interleave(5, dim=0)[None]
    usage = demo.measures.expert_usage(experts, labels, 3, 6)
    expected = torch.kron(torch.eye(3), torch.tensor([0.5, 0.5])).double()
    assert torch.equal(usage[0], expected)
    assert demo.measures.favourite_experts(usage, 2)[0].sort().values.tolist() == [[0, 1], [2, 3], [4, 5]]


def test_same_byte_divergence_ignores_the_alphabet(demo):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(2).repeat_interleave(60)
    # Domain 1 prefers high bytes, but a byte is routed the same wherever it stands, up to noise.
    inputs = torch.randint(0, 40, (120, 64), generator=generator) + 30 * labels[:, None]
    by_byte = 2 * torch.randn(256, 8, generator=generator)
    noise = 0.5 * torch.randn(inputs.numel(), 8, generator=generator)
    same = (by_byte[inputs.flatten()] + noise).softmax(-1)[None]
    plain = demo.measures.domain_divergence(same, labels, 2)[0, 0, 1]
    controlled = demo.measures.same_byte_divergence(same, inputs, labels, 2)[0, 0, 1]
    assert plain > 0.01 and abs(controlled) < 0.1 * plain
    by_domain = (3 * torch.eye(2, 8)[labels.repeat_interleave(64)] + noise).softmax(-1)[None]
    assert demo.measures.same_byte_divergence(by_domain, inputs, labels, 2)[0, 0, 1] > 0.05


def test_same_byte_divergence_without_common_bytes(demo):
    labels = torch.arange(2).repeat_interleave(20)
    inputs = (100 * labels)[:, None].expand(40, 8)
    probabilities = torch.full((1, 320, 4), 0.25)
    assert demo.measures.same_byte_divergence(probabilities, inputs, labels, 2)[0, 0, 1].isnan()


def test_switched_off_experts_are_not_chosen(demo):
    torch.manual_seed(0)
    settings = demo.model.ModelSettings(sequence_length=32, hidden_size=16, intermediate_size=8, experts=4)
    model = demo.model.LanguageModel(settings)
    sequences = torch.randint(0, 256, (6, 33))
    before = demo.measures.observe(model, sequences)
    with demo.measures.switched_off(model, torch.tensor([[0, 2], [1, 3]])):
        during = demo.measures.observe(model, sequences)
    assert set(during.experts[0].flatten().tolist()) == {1, 3} and set(during.experts[1].flatten().tolist()) == {0, 2}
    assert during.loss.isfinite().all() and not torch.equal(during.loss, before.loss)
    assert torch.equal(demo.measures.observe(model, sequences).loss, before.loss)


def test_measures_of_a_model(demo):
    torch.manual_seed(0)
    settings = demo.model.ModelSettings(sequence_length=32, hidden_size=16, intermediate_size=8, experts=4)
    model = demo.model.LanguageModel(settings)
    labels = torch.arange(3).repeat_interleave(10)
    found = demo.measures.measure(model, torch.randint(0, 256, (30, 33)), labels, 3)
    shapes = [tuple(value.shape) for value in found]
    assert shapes == [(3,), (3,), (2, 3, 4), (2,), (2, 3, 3), (2, 3, 3), (2,), (2, 3, 3), (2,), (3,), (3,)]
    assert (found.load >= 1).all() and (found.information >= -1e-12).all()
    assert (found.token_entropy <= math.log(4) + 1e-6).all()


# Sentences


def test_findings_follow_the_numbers(demo):
    names = ["one", "two", "three"]

    def result(arm, bits, divergence, rise):
        square = divergence * (1 - torch.eye(3)).expand(2, 3, 3).double()
        found = demo.measures.Measures(
            bits_per_byte=torch.full((3,), bits),
            standard_error=torch.zeros(3),
            usage=torch.full((2, 3, 4), 0.25),
            load=torch.ones(2),
            divergence=square,
            same_byte=square / 2,
            information=torch.zeros(2),
            overlap=square,
            token_entropy=torch.ones(2),
            rise_own=torch.full((3,), rise),
            rise_others=torch.full((3,), 0.1),
        )
        return demo.train.Result(arm, {}, found, 0.1, math.nan if not arm.divergence else 0.001)

    def findings(*numbers):
        results = [result(arm, *row) for arm, row in zip(demo.train.ARMS, numbers)]
        demo.table.as_text(demo.table.build(results, names), [arm.title for arm in demo.train.ARMS])
        return " ".join(demo.findings.write(results, names))

    hoped = findings((2.5, 0.1, 0.2), (2.3, 0.5, 0.8), (2.55, 0.1, 0.2), (2.5, 0.5, 0.8), (2.5, 0.1, 0.2))
    assert "Better than it: expert divergence (-0.20)" in hoped and "takes true labels to raise it" in hoped
    assert "true labels made the experts more specialised" in hoped
    feared = findings((2.5, 0.1, 0.2), (2.9, 0.5, 0.5), (2.9, 0.5, 0.8), (2.5, 0.1, 0.2), (2.5, 0.1, 0.2))
    assert "Worse than it: expert divergence (+0.40) and random labels (+0.40)" in feared
    assert "100 % of the rise with true labels" in feared and "no proof that the labels mattered" in feared
    assert "random labels made the experts more specialised" in feared
    nothing = findings(*[(2.5, 0.1, 0.0)] * 5)
    assert "did not raise it clearly" in nothing and "Not told apart" in nothing
