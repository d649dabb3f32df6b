"""Runs a function on two processes that talk by gloo."""

import socket

import torch
import torch.distributed as dist

PROCESSES = 2


def _process(rank, port, task):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=PROCESSES)
    try:
        task(rank)
        dist.barrier()  # one that leaves while the other still talks to it may abort it
    finally:
        dist.destroy_process_group()


def run_on_all(task):
    """``task(rank)`` on each; raises where it does on one of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_process, (port, task), PROCESSES)
