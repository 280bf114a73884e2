"""Runs a function in several processes that train as one, as torchrun would start them."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch


def run_in_processes(function: Callable[..., Any], *args: Any, num: int = 2) -> list[Any]:
    """What `function(*args)` returns in each process, by rank; an exception is returned as its text.

    Processes are forked: they have the modules that the parent has.
    """
    context = multiprocessing.get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = context.SimpleQueue()
    processes = [
        context.Process(target=_run, args=(queue, rank, num, port, function, args)) for rank in range(num)
    ]
    for process in processes:
        process.start()
    found = dict(queue.get() for _ in processes)
    for process in processes:
        process.join()
    return [found[rank] for rank in range(num)]


def _run(queue: Any, rank: int, num: int, port: int, function: Callable[..., Any], args: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        result = function(*args)
    except BaseException as error:
        traceback.print_exc()
        result = f"{type(error).__name__}: {error}"
    queue.put((rank, result))
