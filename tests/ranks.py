"""Runs a function on several gloo ranks and brings back what each of them returned, or the traceback of the first that
failed."""

import datetime
import multiprocessing
import multiprocessing.connection
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

SECONDS = 300  # those that hang; a machine with much else to do takes a while
PRELOADED = ("megatron.core.models.gpt.gpt_layer_specs", "megatron.core.distributed")  # slow; ignored where missing

# One process imports them once; ranks are forked from it.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "torch.distributed.tensor", "edl", *PRELOADED])


def _rank(rank: int, world_size: int, folder: Path, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory holds NaN
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(str(folder / "store"), world_size),
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=SECONDS),
        )
        torch.save(function(*arguments), folder / f"result{rank}")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (folder / f"failure{rank}").write_text(traceback.format_exc())
        raise SystemExit(1) from None


def on_ranks(world_size: int, function: Callable, *arguments) -> list:
    """Calls `function(*arguments)`, a function of a module, on every rank of a gloo group.

    Args:
        world_size (int): number of ranks, each a process with one thread and seed 0.
        function (Callable): what each rank runs; torch.distributed is initialised.
        arguments: picklable.

    Returns:
        What the ranks returned, in their order.

    Raises:
        AssertionError: a rank failed, with its traceback; or they did not end in time.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [
            _context.Process(target=_rank, args=(rank, world_size, folder, function, arguments), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + SECONDS
        running = list(processes)
        while running and time.monotonic() < deadline and not any(process.exitcode for process in processes):
            multiprocessing.connection.wait([process.sentinel for process in running], timeout=1)
            running = [process for process in running if process.exitcode is None]
        if running:
            time.sleep(0.5)  # a rank that failed for another's sake may still say so
        for process in processes:
            process.kill()
            process.join()
        failures = "\n".join(f"{path.name}:\n{path.read_text()}" for path in sorted(folder.glob("failure*")))
        assert not failures, failures
        assert not running, f"ranks still ran after {SECONDS} s"
        return [torch.load(folder / f"result{rank}", weights_only=False) for rank in range(world_size)]


class Collectives(TorchDispatchMode):
    """Notes the collectives called inside, and how many numbers this rank puts into each that starts."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.numbers: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("_c10d_functional", "c10d"):
            self.names.append(str(function).split(".")[-2].rstrip("_"))
            if self.names[-1] != "wait_tensor":
                tensors = args[0] if isinstance(args[0], (list, tuple)) else [args[0]]
                self.numbers.append(sum(x.numel() for x in tensors if isinstance(x, torch.Tensor)))
        return function(*args, **(kwargs or {}))
