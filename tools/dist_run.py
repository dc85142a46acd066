"""Start the processes of a distributed run on this machine, and say in one line how it failed.

    python tools/dist_run.py PROCESSES SCRIPT [arguments of the script]

It is torchrun; ``tools/dist_train.sh`` and ``tools/dist_test.sh`` call it. From the environment:
``NNODES`` (1), ``NODE_RANK`` (0), ``MASTER_ADDR`` (this machine) and ``PORT`` (29500).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

USAGE_ERROR = 2  # exit code of a tool that has said in one line what to change
LOOPBACK = '127.0.0.1'


class LaunchError(ValueError):
    """A setting with which nothing can be started."""


def whole_number(text: str, name: str, lowest: int, highest: int | None = None) -> int:
    """Read a setting.

    Raises:
        LaunchError: It is no whole number, or outside the range.
    """
    if not text.isdecimal() or int(text) < lowest or (highest and int(text) > highest):
        end = 'on' if highest is None else f'to {highest}'
        raise LaunchError(f'{name}={text!r} must be a whole number from {lowest} {end}')
    return int(text)


def torchrun_options(
    processes: str, environment: Mapping[str, str], num_gpus: int = 0
) -> list[str]:
    """Options of torchrun.

    Args:
        processes: Number of processes of this machine.
        environment: May hold ``NNODES``, ``NODE_RANK``, ``MASTER_ADDR`` and ``PORT``.
        num_gpus: GPUs of this machine; 0 means that processes run on the CPU.

    Raises:
        LaunchError: A setting does not fit.
    """
    count = whole_number(processes, 'PROCESSES', 1)
    if 0 < num_gpus < count:
        raise LaunchError(
            f'PROCESSES={count}, but this machine has {num_gpus} GPUs, one for each process'
        )
    machines = whole_number(environment.get('NNODES', '1'), 'NNODES', 1)
    number = whole_number(environment.get('NODE_RANK', '0'), 'NODE_RANK', 0)
    if number >= machines:
        raise LaunchError(
            f'NODE_RANK={number} must be below NNODES={machines}: machines count from 0'
        )
    address = environment.get('MASTER_ADDR', LOOPBACK if machines == 1 else '')
    if not address:
        raise LaunchError(f'NNODES={machines} needs MASTER_ADDR, the address of machine 0')
    port = whole_number(environment.get('PORT', '29500'), 'PORT', 1, 65535)
    return [
        f'--nnodes={machines}',
        f'--node-rank={number}',
        f'--master-addr={address}',
        f'--master-port={port}',
        f'--nproc-per-node={count}',
    ]


def first_cause(failures: Mapping[int, Any]) -> tuple[int, Any]:
    """Rank and record of the process that most likely ended the others.

    One that was killed comes first, since the others then fail on the connection to it; one that
    was ended by SIGTERM comes last, which is how torchrun ends what is left.
    """

    def order(item: tuple[int, Any]) -> tuple[int, int]:
        code, timestamp = item[1].exitcode, item[1].timestamp
        if code == -signal.SIGTERM:
            return 2, timestamp
        return (0 if code < 0 else 1), timestamp

    return min(failures.items(), key=order)


def description(rank: int, code: int, script: str) -> str:
    """What to tell a person of a process that has ended.

    Args:
        rank: Number of the process.
        code: Its exit code, negative for a signal.
        script: What it ran.
    """
    if code < 0:
        name = signal.Signals(-code).name
        how = f'was ended by {name}'
        if name == 'SIGKILL':
            how += ' (by a person, a scheduler, or the system because memory ran out)'
    else:
        how = f'ended with exit code {code}; it says why above'
    if Path(script).name == 'train.py':
        return (
            f'process {rank} {how}. Checkpoints are whole; start the same command again with '
            '--resume to go on from the last one'
        )
    return f'process {rank} {how}. Start the same command again'


def _fail(message: str, code: int) -> NoReturn:
    print(f'error: {message}', file=sys.stderr, flush=True)
    sys.exit(code)


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def main(arguments: Sequence[str]) -> None:
    """Run the script in several processes."""
    if len(arguments) < 2:
        _fail('usage: python tools/dist_run.py PROCESSES SCRIPT [arguments]', USAGE_ERROR)
    processes, script, *rest = arguments
    try:
        # What is wrong with the settings shows before torch has been imported.
        torchrun_options(processes, os.environ)
        options = torchrun_options(processes, os.environ, _count_gpus())
    except LaunchError as error:
        _fail(str(error), USAGE_ERROR)

    from torch.distributed import DistNetworkError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun([*options, script, *rest])
    except ChildFailedError as error:
        rank, failure = first_cause(error.failures)
        code = failure.exitcode
        if code == USAGE_ERROR:
            sys.exit(code)
        _fail(description(rank, code, script), code if code > 0 else 128 - code)
    except SignalException as error:
        _fail(f'stopped by {error.sigval.name}, and its processes with it', 128 + error.sigval)
    except DistNetworkError as error:
        _fail(
            f'the processes cannot meet ({" ".join(str(error).split())[:300]}). Choose another '
            'port with PORT=, and see that MASTER_ADDR is the address of machine 0',
            1,
        )


if __name__ == '__main__':
    main(sys.argv[1:])
