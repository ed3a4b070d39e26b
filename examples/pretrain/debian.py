"""Text of three domains from Debian's documentation packages, without root: apt-get fetches, dpkg-deb unpacks.

apt checks every download against the signed package lists. A package counts as finished only when it has been renamed
into the cache, so whatever an interrupted run leaves behind is never mistaken for a package.
"""

import contextlib
import io
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import urllib.parse
from typing import NamedTuple


class Package(NamedTuple):
    """The part of a Debian package that is text of one domain.

    Attributes:
        domain: name of the domain.
        name: name of the package.
        files: regular expression for the paths to read. GAP's manual holds each chapter twice (chap5, chap5_mj), and
            its tables of contents and indices say nothing that the chapters do not.
        licence: licence of the text, as the package's copyright file has it.
        chinese: smallest share of Chinese characters among the letters of a document; many pages of a translated
            manual are still in English.
    """

    domain: str
    name: str
    files: str
    licence: str
    chinese: float = 0.0


PACKAGES = (
    Package("English", "anarchism", r"/markdown/.*\.md(\.gz)?$", "GPL-2"),
    Package("Chinese", "libreoffice-help-zh-cn", r"/help/zh-CN/text/.*\.html$", "MPL-2.0", chinese=0.5),
    Package("Chinese", "debian-reference-zh-cn", r"/(ch|pr|ap)\w+\.zh-cn\.html$", "GPL-2+", chinese=0.35),
    Package("mathematics", "gap-doc", r"/doc/(ref|tut)/chap[1-9]\d*\.html$", "GPL-2+"),
    Package("mathematics", "pari-doc", r"/(tutorial.*|usersch\d)\.tex$", "GPL-2+"),
)

TIMEOUT_SECONDS = 600


class DownloadError(Exception):
    """A package could not be had; the message is what apt-get or dpkg-deb said last."""


class DamagedPackage(Exception):
    """A package file that dpkg-deb cannot read to its end."""


def tools_missing():
    """Returns the names of the needed Debian tools that are not installed."""
    return [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]


class Packages:
    """A folder of downloaded packages.

    Arguments:
        folder: pathlib.Path of the cache. It also takes private package lists when the system's are missing or too
            old to download from, because refreshing the system's own would need root.
    """

    def __init__(self, folder):
        self.folder = folder
        self.lists = None
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name):
        """Returns the path of a package, downloaded unless an earlier run has finished that.

        Raises:
            DownloadError: after trying with the system's package lists, and twice with fresh ones.
        """
        finished = sorted(self.folder.glob(f"{name}_*.deb"))
        if finished:
            return finished[-1]
        errors = []
        for fresh_lists in (False, True, True):
            try:
                if fresh_lists and self.lists is None:
                    self._fetch_lists()
                return self._download(name)
            except DownloadError as error:
                errors.append(str(error))
        raise DownloadError(errors[-1])

    def read(self, name, files):
        """Reads files of a package; a damaged package in the cache is fetched once more.

        Arguments:
            name: name of the package.
            files: regular expression for the paths to read.

        Returns:
            (path of the package, list of (file name, bytes) in the order of their names).
        """
        archive = self.get(name)
        try:
            return archive, unpack(archive, files)
        except DamagedPackage:
            archive.unlink()
        archive = self.get(name)
        try:
            return archive, unpack(archive, files)
        except DamagedPackage as error:
            archive.unlink()
            raise DownloadError(f"{archive.name} is damaged ({error})") from error

    def _download(self, name):
        """Downloads beside the finished packages and renames at the end."""
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="unfinished-") as unfinished:
            self._apt_get("download", name, folder=unfinished)
            arrived = [entry for entry in os.listdir(unfinished) if entry.endswith(".deb")]
            if len(arrived) != 1:
                raise DownloadError(f"apt-get download left {len(arrived)} packages instead of one")
            target = self.folder / arrived[0]
            os.replace(os.path.join(unfinished, arrived[0]), target)
        return target

    def _fetch_lists(self):
        """Fetches package lists of the configured sources into the cache."""
        lists = self.folder / "lists"
        for folder in (lists / "partial", self.folder / "apt" / "archives" / "partial"):
            folder.mkdir(parents=True, exist_ok=True)
        print("  The package lists of this system did not do: fetching fresh ones (about 10 MB).", flush=True)
        self.lists = lists
        # One unreachable source among several is common and harmless; the download that follows will tell.
        with contextlib.suppress(DownloadError):
            self._apt_get("update", folder=self.folder / "apt")

    def _apt_get(self, *arguments, folder):
        options = [
            "Acquire::Retries=3",
            "Acquire::http::Timeout=30",
            "Acquire::https::Timeout=30",
            "Acquire::Languages=none",
            "Acquire::IndexTargets::deb-src::Sources::DefaultEnabled=false",
        ]
        if os.geteuid() == 0:
            options.append("APT::Sandbox::User=root")  # apt's own user may not write to the cache, and would warn
        if self.lists is not None:
            options += [f"Dir::State::Lists={self.lists.resolve()}", f"Dir::Cache={(self.folder / 'apt').resolve()}"]
            options.append("Debug::NoLocking=1")
        command = ["apt-get", "--quiet", *(word for option in options for word in ("--option", option)), *arguments]
        environment = dict(os.environ, LC_ALL="C")
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                errors="replace",
                stdin=subprocess.DEVNULL,
                timeout=TIMEOUT_SECONDS,
            )
        except subprocess.TimeoutExpired as error:
            raise DownloadError(f"apt-get took longer than {TIMEOUT_SECONDS} seconds") from error
        except OSError as error:
            raise DownloadError(f"apt-get did not start ({error.strerror})") from error
        if done.returncode:
            complaints = [line[2:].strip() for line in done.stderr.splitlines() if line.startswith("E:")]
            raise DownloadError(complaints[0] if complaints else f"apt-get ended with code {done.returncode}")


def unpack(archive, files):
    """Reads the files of a package whose path matches, without writing anything to disk.

    Arguments:
        archive: path of a `.deb` file.
        files: regular expression.

    Returns:
        List of (path inside the package, bytes), sorted by path.
    """
    done = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(archive)], capture_output=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise DamagedPackage(f"dpkg-deb ended with code {done.returncode}")
    wanted = re.compile(files)
    try:
        with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tree:
            return sorted(
                (member.name, tree.extractfile(member).read())
                for member in tree
                if member.isfile() and wanted.search(member.name)
            )
    except tarfile.TarError as error:
        raise DamagedPackage(str(error)) from error


def version_of(archive):
    """Returns the version in the file name of a package (apt writes the colon of an epoch as %3a)."""
    return urllib.parse.unquote(archive.name.split("_")[1])
