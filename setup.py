"""Builds edl: `libedl`, a library of torch operators without Python inside, and a small module with build facts.

Environment: EDL_BUILD_CUDA=0/1 overrides the choice of CUDA; MAX_JOBS and TORCH_CUDA_ARCH_LIST as for every torch
    extension.
"""

import copy
import os
import platform
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.dist_info import dist_info
from setuptools.command.sdist import sdist
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "tools"))
import cuda_toolkit  # noqa: E402

LIBRARY = "edl.lib.libedl"
OLDEST_TORCH, NEWEST_TORCH = (2, 11), (2, 15)  # the only place: what is written elsewhere is compared with it
OLDEST_SETUPTOOLS = 77  # the licence in pyproject.toml
INSTALL_HINT = (
    "edl is compiled against the PyTorch it will run with: install torch {}.{} to {}.{} first, "
    "then run `pip install --no-build-isolation .`"
).format(*OLDEST_TORCH, *NEWEST_TORCH)

if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    sys.exit(
        f"edl is built with setuptools {OLDEST_SETUPTOOLS} or newer: run `pip install --upgrade setuptools` first "
        f"(got setuptools {setuptools.__version__})"
    )

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    torch = None


class BuildWithoutTorch(build_ext):
    """Says what to do where there is no torch; a source archive needs none."""

    def run(self):
        sys.exit(f"{INSTALL_HINT} (without that option pip hides an installed torch from the build)")


class MetadataWithoutTorch(dist_info):
    """pip asks for the metadata first: stopping here keeps it from fetching a torch that the build would not see."""

    run = BuildWithoutTorch.run


class SourceArchive(sdist):
    """Asks for every torch that is supported, whatever torch is here: what is built from it does not yet exist."""

    def run(self):
        self.distribution.install_requires = [torch_requirement(None)]
        self.distribution.metadata.install_requires = self.distribution.install_requires
        super().run()


def torch_requirement(version):
    """What to install edl beside: the minor release of torch that it is compiled for, or, of sources, any from the
    oldest on."""
    if version is None:
        return "torch>={}.{}".format(*OLDEST_TORCH)
    major, minor = torch_minor(version)
    # A build of torch before its release is older than the release by the rules of versions.
    is_release = re.fullmatch(r"[\d.]+(\.post\d+)?", version.split("+")[0])
    return f"torch>={major}.{minor}{'' if is_release else '.dev0'},<{major}.{minor + 1}"


def torch_minor(version):
    return tuple(int(part) for part in version.split(".")[:2])


def glob(pattern):
    """Sorted paths relative to the root: adding a file is enough to build it."""
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def build_cuda():
    """CUDA when torch has it and nvcc is found; never decided by a visible GPU, which build machines lack."""
    home = cuda_toolkit.find().home
    possible = torch.version.cuda is not None and home is not None
    wanted = os.environ.get("EDL_BUILD_CUDA", "").strip()
    if wanted not in ("", "0", "1"):
        sys.exit(f"edl: EDL_BUILD_CUDA must be 0 or 1 (got {wanted!r})")
    if wanted == "1" and not possible:
        sys.exit(
            "edl: EDL_BUILD_CUDA=1 needs a torch built with CUDA, and nvcc with cuda_runtime.h, below CUDA_HOME, "
            "around the nvcc of PATH or in /usr/local/cuda "
            f"(got torch.version.cuda = {torch.version.cuda}, toolkit = {home})"
        )
    if not possible or wanted == "0":
        return False
    cpp_extension.CUDA_HOME = str(home)  # torch takes the folder of a wrapper called nvcc for the toolkit
    return True


def default_architectures():
    """As TORCH_CUDA_ARCH_LIST takes them; later devices compile what is there for the newest."""
    nvcc = cuda_toolkit.find().nvcc
    found = cuda_toolkit.architectures(nvcc)
    if not found:
        sys.exit(
            f"edl: nvcc must compile for one of compute capability {', '.join(cuda_toolkit.ARCHITECTURES)}, or "
            f"TORCH_CUDA_ARCH_LIST name others (got {nvcc}, which lists none of them)"
        )
    return ";".join(found) + "+PTX"


def check_torch_version():
    version = torch_minor(torch.__version__)
    if version < OLDEST_TORCH:
        sys.exit(f"{INSTALL_HINT} (got torch {torch.__version__})")
    if version > NEWEST_TORCH:
        newest = "{}.{}".format(*NEWEST_TORCH)
        print(
            f"edl has been tested with torch up to {newest}, and not with torch {torch.__version__}: run its tests "
            "(`make test`) before you rely on it",
            file=sys.stderr,
        )


# Most of a source's compile time is reading these: they are read once for all.
INCLUDE_DIRS = [str(ROOT / "csrc"), str(ROOT / "csrc" / "include")]
TORCH_HEADERS = ("ATen/Parallel.h", "torch/csrc/autograd/custom_function.h", "torch/library.h")

# The flags of each build of cpu/isa, the width of its vector registers, and its sources.
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512"]
LOOPS, TILE_LOOPS = "csrc/cpu/isa/*.cpp", "csrc/cpu/isa/tiles/*.cpp"
INSTRUCTION_SETS = {"baseline": (16, [], LOOPS)}
X86_INSTRUCTION_SETS = {
    "avx2": (32, ["-mavx2", "-mfma", "-mf16c"], LOOPS),
    "avx512": (64, AVX512, LOOPS),
}
MATRIX_INSTRUCTION_SETS = {"avx512_amx": (64, AVX512, TILE_LOOPS)}  # everything else of it is that of avx512


def is_x86():
    return platform.machine().lower() in ("x86_64", "amd64")


if torch is not None:

    class Build(cpp_extension.BuildExtension):
        """Reads torch's headers once, compiles cpu/isa once per instruction set, lays our headers beside the
        library."""

        def finalize_options(self):
            super().finalize_options()
            version = ("EDL_VERSION", f'"{self.distribution.get_version()}"')
            for extension in self.extensions:
                if version not in extension.define_macros:  # builds finalise more than once, by how they were asked for
                    extension.define_macros.append(version)
            if self.editable_mode:  # pip would build in a folder of its own, and everything again each time
                self.build_temp = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"

        def build_extensions(self):
            if is_x86() and self.assembles_tiles():
                for extension in self.extensions:
                    extension.define_macros = [*extension.define_macros, ("EDL_WITH_AMX", None)]
            super().build_extensions()
            self.copy_headers(Path(self.build_lib) / "edl")

        def build_extension(self, extension):
            if extension.name == LIBRARY:
                with ThreadPoolExecutor() as pool:
                    headers = pool.submit(self.precompile_torch_headers, extension)
                    extension.extra_objects = self.compile_instruction_sets(extension.define_macros)
                extension.extra_compile_args["cxx"] += ["-include", headers.result()]
            super().build_extension(extension)

        def precompile_torch_headers(self, extension):
            """A header with its precompiled form beside it, which a compiler takes where the flags are the same."""
            folder = Path(self.build_temp, "torch_headers").resolve()
            folder.mkdir(parents=True, exist_ok=True)
            header = folder / "torch_headers.hpp"  # C++ by its name, also for a compiler driver called gcc
            text = "".join(f"#include <{name}>\n" for name in TORCH_HEADERS)
            if not header.exists() or header.read_text() != text:
                header.write_text(text)
            self.compiler.src_extensions = [*self.compiler.src_extensions, ".hpp"]
            [compiled] = self.compiler.compile(
                [str(header)],
                output_dir=str(folder),
                include_dirs=extension.include_dirs,
                macros=extension.define_macros,
                extra_postargs=copy.deepcopy(extension.extra_compile_args),
            )
            shutil.copyfile(compiled, f"{header}.gch")
            return str(header)

        def assembles_tiles(self):
            """Whether the assembler knows the instructions of matrix units (binutils 2.35)."""
            source = Path(self.build_temp, "tiles.cpp")
            source.parent.mkdir(parents=True, exist_ok=True)
            source.write_text('asm("tdpbf16ps %tmm0, %tmm1, %tmm2");\n')
            try:
                self.compiler.compile([str(source)], output_dir=str(source.parent))
            except CompileError:
                print("edl: the assembler knows no AMX (see above): built without avx512_amx", file=sys.stderr)
                return False
            return True

        def copy_extensions_to_source(self):
            """An in-place (editable) build: the package is the source folder."""
            (ROOT / "edl" / "lib").mkdir(exist_ok=True)
            super().copy_extensions_to_source()
            self.copy_headers(ROOT / "edl")

        def compile_instruction_sets(self, macros):
            sets = INSTRUCTION_SETS | (X86_INSTRUCTION_SETS if is_x86() else {})
            if ("EDL_WITH_AMX", None) in macros:
                sets |= MATRIX_INSTRUCTION_SETS
            objects = []
            for name, (vector_bytes, flags, sources) in sets.items():
                objects += self.compiler.compile(
                    glob(sources),
                    output_dir=os.path.join(self.build_temp, name),
                    include_dirs=INCLUDE_DIRS,
                    macros=[("EDL_ISA", name), ("EDL_VECTOR_BYTES", str(vector_bytes))],
                    extra_postargs=[
                        "-std=c++20",
                        "-O3",
                        "-g0",
                        "-fPIC",
                        "-fvisibility=hidden",
                        "-Wno-psabi",
                        "-Wno-maybe-uninitialized",
                        *flags,
                    ],
                )
            return objects

        def copy_headers(self, package):
            shutil.rmtree(package / "include", ignore_errors=True)
            shutil.copytree(ROOT / "csrc" / "include", package / "include")

        def get_ext_filename(self, name):
            # `name` comes with or without its packages; only the library goes without Python's suffix.
            return name.replace(".", "/") + ".so" if name.endswith("libedl") else super().get_ext_filename(name)


def extensions():
    if torch is None:
        return [Extension(LIBRARY, [])]
    check_torch_version()
    with_cuda = build_cuda()
    cuda_version = torch.version.cuda if with_cuda else ""
    print(
        f"edl: torch {torch.__version__}, CUDA {cuda_version or 'off'}, Python {platform.python_version()}; compiling "
        "takes some minutes, in which nothing more may show"
    )
    sources = glob("csrc/*.cpp") + glob("csrc/ops/*.cpp") + glob("csrc/cpu/*.cpp")
    macros = [
        ("EDL_TORCH_VERSION", f'"{torch.__version__}"'),
        ("EDL_CUDA_VERSION", f'"{cuda_version}"'),
    ]
    if is_x86():
        macros.append(("EDL_WITH_X86", None))
    # at::parallel_for is a template: without -fopenmp here it would quietly run on one thread.
    host_flags = [
        "-std=c++20",
        "-O2",
        "-g0",
        "-fopenmp",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-Wno-unused-parameter",
    ]
    flags = {"cxx": host_flags}
    make_extension = cpp_extension.CppExtension
    if with_cuda:
        if "TORCH_CUDA_ARCH_LIST" not in os.environ:
            os.environ["TORCH_CUDA_ARCH_LIST"] = default_architectures()
        sources += glob("csrc/cuda/*.cpp") + glob("csrc/cuda/kernels/*.cu")
        flags["nvcc"] = ["-std=c++20", "-O3", "-lineinfo"]
        make_extension = cpp_extension.CUDAExtension
    library = make_extension(
        LIBRARY,
        sources,
        include_dirs=INCLUDE_DIRS,
        define_macros=macros,
        extra_compile_args=flags,
        extra_link_args=[
            "-fopenmp",
            "-Wl,-soname,libedl.so",
            "-Wl,-rpath,$ORIGIN/../../torch/lib",
            "-Wl,--no-undefined",
        ],
    )
    library.libraries.remove("torch_python")  # C++ programs need no Python
    facts = Extension(
        "edl._build",
        ["csrc/python/build_facts.cpp"],
        include_dirs=[os.path.join(cpp_extension.include_paths()[0])],  # pybind11 comes with torch
        define_macros=macros,
        extra_compile_args=["-std=c++20", "-O1", "-g0", "-fvisibility=hidden"],
        language="c++",
    )
    if os.environ.get("EDL_PREBUILT_LIBRARY") == "1":  # tools/gpu.py has put one in its place
        return [facts]
    return [library, facts]


setup(
    ext_modules=extensions(),
    install_requires=[torch_requirement(None if torch is None else torch.__version__)],
    cmdclass={"sdist": SourceArchive}
    | (
        {"build_ext": Build}
        if torch is not None
        else {"build_ext": BuildWithoutTorch, "dist_info": MetadataWithoutTorch}
    ),
)
