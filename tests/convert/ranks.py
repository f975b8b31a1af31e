"""A function on several processes that talk through Gloo, as `torchrun` starts them, with a bounded wait."""

import faulthandler
import gc
import os
import socket
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

PATIENCE_S = 120


def one_rank(rank: int, ranks: int, folder: str, function: Callable, arguments: tuple):
    """Meet the others, then leave what `function` returns; say where it hangs if it does."""
    faulthandler.dump_traceback_later(PATIENCE_S, exit=True)
    torch.set_num_threads(1)
    # The address of the host's name may lead to an interface on which a closed machine answers nobody.
    if "lo" in [name for _, name in socket.if_nameindex()]:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    patience = timedelta(seconds=PATIENCE_S / 2)
    distributed.init_process_group(
        "gloo", f"file://{folder}/meet", rank=rank, world_size=ranks, timeout=patience
    )
    met = torch.ones(1)
    distributed.all_reduce(met)
    Path(folder, f"met {rank}").touch()
    torch.save(function(rank, *arguments), f"{folder}/{rank}")
    gc.collect()  # a DDP model that outlives its process group is freed under the GIL, and may wait for ever
    distributed.destroy_process_group()
    faulthandler.cancel_dump_traceback_later()


def on_ranks(function: Callable, *arguments, ranks: int = 2) -> list[Any]:
    """Return what `function(rank, *arguments)` returns on each process, in the order of the ranks.

    The calling test is skipped if the processes cannot exchange one number: a machine may forbid it.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.multiprocessing.spawn(one_rank, (ranks, folder, function, arguments), nprocs=ranks)
        except (torch.multiprocessing.ProcessRaisedException, torch.multiprocessing.ProcessExitedException):
            if all(Path(folder, f"met {rank}").exists() for rank in range(ranks)):
                raise
            pytest.skip(f"{ranks} processes cannot exchange a number by Gloo on this machine")
        return [torch.load(f"{folder}/{rank}", weights_only=True) for rank in range(ranks)]
