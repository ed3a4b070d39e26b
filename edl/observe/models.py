"""The model to be watched: a checkpoint of transformers, or what a function of one's own gives."""

import dataclasses
import hashlib
import importlib
import inspect
import os
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from edl import extras
from edl.observe.sample import Tokens, bytes_of, tokens_of

# How code of transformers scores by sigmoid, where the configuration does not say so.
_SIGMOID = re.compile(r"logits(\.float\(\)|\.to\([^)]*\))?\.sigmoid\(|sigmoid\(\s*\w*(router|logits)")


@dataclasses.dataclass(frozen=True, eq=False)
class WatchedModel:
    """A model and how text becomes its tokens.

    Attributes:
        model (nn.Module): in evaluation mode.
        tokenizer (object, optional): of transformers; None: the bytes of UTF-8.
        context (int): tokens that it reads at most; 0 where it does not say.
        scores (str): of its routers' logits, "softmax" or "sigmoid".
        facts (dict): what it is, for people to read.
        identity (str): another one for another model.
    """

    model: nn.Module
    tokenizer: Any
    context: int
    scores: str
    facts: dict[str, str]
    identity: str

    def tokenize(self, length: int) -> Callable[[str], Tokens]:
        """What gives the first tokens of a text."""
        return bytes_of(length) if self.tokenizer is None else tokens_of(self.tokenizer, length)

    @property
    def device(self) -> torch.device:
        """Where its inputs go."""
        first = next(self.model.parameters(), None)
        # Parts that are elsewhere until they run have hooks which fetch their inputs.
        return torch.device("cpu") if first is None or first.is_meta else first.device


def load_checkpoint(
    folder: str, device_map: str | None, dtype: str, trust_remote_code: bool, with_head: bool, with_bar: bool
) -> WatchedModel:
    """Loads a checkpoint and its tokenizer from a folder, or what transformers has in its cache under a name.

    Args:
        folder (str): with config.json and tokenizer.
        device_map (str, optional): of transformers; "auto" spreads a model over what there is.
        dtype (str): of transformers; "auto" is the checkpoint's.
        trust_remote_code (bool): whether to run code that comes with the checkpoint.
        with_head (bool): whether the next tokens are to be predicted.
        with_bar (bool): whether transformers may show its progress.

    Raises:
        ImportError: no transformers.
        ValueError: what transformers cannot load.
    """
    transformers = extras.require("transformers", "observe", "transformers")
    # Without the network: a name that was mistyped would be asked for a minute long.
    shared = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    kind = transformers.AutoModelForCausalLM if with_head else transformers.AutoModel
    with _quiet(transformers, with_bar):
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **shared)
            model = kind.from_pretrained(folder, dtype=dtype, device_map=device_map, **shared)
        except Exception as error:  # whatever is in the folder
            raise ValueError(
                f"edl::observe: MODEL must be a checkpoint that transformers can load, --loader loads others (got "
                f"{folder}: {_first_line(error)})"
            ) from error
    texts = model.config.get_text_config()
    facts = {
        "model": _last_name(folder),
        "architecture": type(model).__name__,
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        "dtype": str(model.dtype).removeprefix("torch."),
        "transformers": transformers.__version__,
    }
    context = getattr(texts, "max_position_embeddings", 0) or 0
    identity = f"{_identity(folder)} {dtype} {device_map}"
    return WatchedModel(model.eval(), tokenizer, context, _scores_of(model, texts), facts, identity)


def _scores_of(model: nn.Module, configuration: Any) -> str:
    """By the configuration, or by the architecture's source where that does not say."""
    named = getattr(configuration, "scoring_func", None) or getattr(configuration, "score_function", None)
    if named in ("softmax", "sigmoid"):
        return str(named)
    try:
        source = inspect.getsource(sys.modules[type(model).__module__])
    except (OSError, TypeError):
        return "softmax"
    return "sigmoid" if _SIGMOID.search(source) else "softmax"


class _quiet:
    """transformers' warnings about parts that nobody asked for stay out of the way, and its bars unless wanted."""

    def __init__(self, transformers: Any, with_bar: bool) -> None:
        self._logging = transformers.utils.logging
        self._hides_bar = not with_bar and self._logging.is_progress_bar_enabled()

    def __enter__(self) -> None:
        self._before = self._logging.get_verbosity()
        self._logging.set_verbosity_error()
        if self._hides_bar:
            self._logging.disable_progress_bar()

    def __exit__(self, *error: object) -> None:
        self._logging.set_verbosity(self._before)
        if self._hides_bar:
            self._logging.enable_progress_bar()


def load_own(loader: str, path: str) -> WatchedModel:
    """Calls a function of the user's, which is given the path and returns (model, tokenizer).

    Args:
        loader (str): "module:function" or "file.py:function"; modules in the current folder are found too.
        path (str): what the function is given.

    Raises:
        ValueError: no such function, or it returns something else.
    """
    name, _, function = loader.rpartition(":")
    if not name or not function:
        raise ValueError(f"edl::observe: --loader must be module:function or file.py:function (got {loader})")
    folder = pathlib.Path.cwd()
    if name.endswith(".py"):
        folder, name = pathlib.Path(name).resolve().parent, pathlib.Path(name).stem
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        load = getattr(importlib.import_module(name), function)
    except (AttributeError, ImportError) as error:
        raise ValueError(f"edl::observe: --loader must be a function in a module (got {loader}: {error})") from error
    if not callable(load):
        raise ValueError(f"edl::observe: --loader must be a function in a module (got {loader}: {load!r})")
    given = load(path)
    if not (isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], nn.Module)):
        raise ValueError(
            "edl::observe: the function of --loader must return (model, tokenizer), None for bytes "
            f"(got {type(given).__name__})"
        )
    model, tokenizer = given
    is_tokenizer = callable(tokenizer) and hasattr(tokenizer, "all_special_ids") and hasattr(tokenizer, "decode")
    if tokenizer is not None and not is_tokenizer:
        raise ValueError(
            "edl::observe: the tokenizer of --loader must be one of transformers, None for bytes (got "
            f"{type(tokenizer).__name__})"
        )
    context = getattr(getattr(model, "config", None), "max_position_embeddings", 0) or 0
    parameters = sum(parameter.numel() for parameter in model.parameters())
    facts = {"model": _last_name(path), "architecture": type(model).__name__, "parameters": f"{parameters:,}"}
    return WatchedModel(model.eval(), tokenizer, context, "softmax", facts, f"{_identity(path)} {loader}")


def _last_name(path: str) -> str:
    """Folders above a model are nobody's business."""
    return pathlib.Path(path).resolve().name if os.path.exists(path) else path


def _identity(path: str) -> str:
    """The files of a checkpoint, by name, size and time of the last change."""
    root = pathlib.Path(path)
    files = sorted(root.rglob("*")) if root.is_dir() else [root]
    states = [(str(file.relative_to(root)), file.stat()) for file in files if file.is_file()]
    facts = [path, *((name, state.st_size, state.st_mtime_ns) for name, state in states)]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
