"""Runs programs for the tests: the tools of this environment first, whether or not it is activated."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}


def run(*command, env=ENVIRONMENT, **options) -> str:
    """The output of a command that succeeds."""
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=env, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def build_with_cmake(source: Path, build: Path, prefix_path: str, *options: str) -> None:
    """Configures and builds a project; what is up to date is not compiled again."""
    cmake = shutil.which("cmake", path=ENVIRONMENT["PATH"])
    assert cmake, "the C++ tests need cmake and ninja: run `pip install -r tests/requirements.txt`"
    build.parent.mkdir(exist_ok=True)
    with FileLock(f"{build}.lock"):  # of tests side by side one builds
        run(cmake, "-G", "Ninja", "-S", source, "-B", build, f"-DCMAKE_PREFIX_PATH={prefix_path}", *options)
        run(cmake, "--build", build)
