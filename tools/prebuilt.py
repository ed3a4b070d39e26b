"""A library that was built elsewhere, for a machine whose minutes are few: what it is good for, and whether it fits.

    TORCH_CUDA_ARCH_LIST=9.0 python tools/prebuilt.py

builds edl with the running torch and keeps the library in build/prebuilt, which `make gpu` looks into.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TypedDict

import torch

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "prebuilt"


class Facts(TypedDict):
    """What a library was built from and for."""

    sources: str
    torch: str
    CUDA: str | None
    system: str
    architectures: list[str]


def _digest() -> str:
    """Of the names and contents of everything that a library is built from."""
    digest = hashlib.sha256()
    for path in [ROOT / "setup.py", *sorted((ROOT / "csrc").rglob("*"))]:
        if path.is_file():
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def facts_here(architectures: list[str]) -> Facts:
    """Those of a library that would be built now."""
    return {
        "sources": _digest(),
        "torch": torch.__version__.split("+")[0],
        "CUDA": torch.version.cuda,
        "system": f"{platform.system()} {platform.machine()}",
        "architectures": architectures,
    }


def problem(folder: Path, architecture: str | None) -> str | None:
    """Why the library in a folder does not fit.

    Args:
        folder (Path): that may hold libedl.so and facts.json.
        architecture (str, optional): compute capability of the device, such as "9.0".

    Returns:
        A sentence, or None where it fits.
    """
    file = folder / "facts.json"
    if not file.exists() or not (folder / "libedl.so").exists():
        return "there is none"
    has, here = json.loads(file.read_text()), facts_here([])
    for name in ("sources", "torch", "CUDA", "system"):
        if has[name] != here[name]:
            return f"its {name} differ: {has[name]}, here {here[name]}"
    if architecture is not None and architecture not in has["architectures"]:
        return f"it is for {', '.join(has['architectures']) or 'no device'}, the device is {architecture}"
    return None


def take(folder: Path) -> None:
    """Puts the library of a folder where setup.py would put its own."""
    (ROOT / "edl" / "lib").mkdir(exist_ok=True)
    shutil.copy(folder / "libedl.so", ROOT / "edl" / "lib")


def keep(library: Path, folder: Path, architectures: list[str]) -> None:
    """Copies a library built from these sources with the running torch into a folder, with its facts."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(library, folder / "libedl.so")
    (folder / "facts.json").write_text(json.dumps(facts_here(architectures), indent=2) + "\n")


def main() -> None:
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, check=True)
    keep(ROOT / "edl" / "lib" / "libedl.so", FOLDER, re.findall(r"\d+\.\d", os.environ.get("TORCH_CUDA_ARCH_LIST", "")))
    print(f"{FOLDER / 'libedl.so'}: {(FOLDER / 'libedl.so').stat().st_size >> 20} MiB")


if __name__ == "__main__":
    main()
