"""Runs a function in several processes of one gloo group, without importing anything anew."""

import os
import traceback
from pathlib import Path

import torch
from torch import multiprocessing

# How a model is wrapped on CPUs; tools/train.py sets the same.
WRAPPERS = {
    'ddp': dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=True,
        device_ids=None,
    ),
    'fsdp': dict(type='FullyShardedModel'),
}


def _run(rank, world, folder, function, arguments):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    try:
        torch.distributed.init_process_group(
            'gloo', init_method=f'file://{folder}/meeting', rank=rank, world_size=world
        )
        torch.save(function(rank, *arguments), folder / f'result_{rank}.pth')
        torch.distributed.barrier()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    # Without tearing down what the parent has: the test runner lives there.
    os._exit(0)


def run_ranks(folder, function, *arguments, world=2, codes=None):
    """What a function returns on each rank.

    Args:
        folder: Empty folder of this call.
        function: Gets the rank, then the arguments.
        arguments: Further arguments.
        world: Number of processes.
        codes: Exit codes to expect, where these are not those of success; then nothing is returned.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context('fork')
    processes = [
        context.Process(target=_run, args=(rank, world, folder, function, arguments))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
    assert [process.exitcode for process in processes] == (codes or [0] * world)
    if codes:
        return None
    return [torch.load(folder / f'result_{rank}.pth', weights_only=False) for rank in range(world)]
