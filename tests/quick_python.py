"""A Python that starts at once: an executable whose programs run in forks of the test runner.

The libraries take most of the time of a program that trains a toy, and the runner has them already.
The executable hands its command line, environment, folder and streams to a process that was forked
from the runner; it passes SIGTERM on, and ends as its program does.
"""

import atexit
import json
import multiprocessing
import os
import runpy
import socket
import sys
import uuid
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from pathlib import Path

CLIENT = f"""#!{sys.executable} -IS
import json, os, signal, socket, sys
with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
    server.connect(ADDRESS)
    request = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
    socket.send_fds(server, [request], [0, 1, 2])
    program = int(server.recv(20))
    signal.signal(signal.SIGTERM, lambda number, _: os.kill(program, number))
    code = int(server.recv(20) or 1)
if code < 0:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""
FORK = multiprocessing.get_context('fork')


@contextmanager
def quick_python(folder: Path):
    """Path of the executable, as long as it works; Linux only."""
    program = folder / 'quick_python'
    address = f'\0{uuid.uuid4().hex}'  # one without a file
    program.write_text(CLIENT.replace('ADDRESS', repr(address)))
    program.chmod(0o755)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(address)
        listener.listen()
        server = FORK.Process(target=_serve, args=(listener,))
        server.start()
    try:
        yield program
    finally:
        server.kill()
        server.join()


def _serve(listener):
    # What the test runner does at its end is not for programs.
    atexit._clear()
    runner = multiprocessing.parent_process().sentinel
    while listener in wait([listener, runner]):
        connection, _ = listener.accept()
        with connection:
            FORK.Process(target=_attend, args=(connection,)).start()


def _attend(connection):
    """Run a program and tell its number, then how it ended; kill it if nobody wants to know."""
    request, streams, *_ = socket.recv_fds(connection, 1 << 20, 3)
    process = FORK.Process(target=_run, args=(*json.loads(request), streams))
    process.start()
    connection.send(str(process.pid).encode())
    if connection in wait([connection, process.sentinel]):
        process.kill()
    process.join()
    with suppress(BrokenPipeError):
        connection.send(str(process.exitcode).encode())


def _run(arguments, environment, folder, streams):
    """What ``python [-u] FILE ...`` and ``python -m MODULE ...`` do."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    for number, name in enumerate(('stdin', 'stdout', 'stderr')):
        setattr(sys, name, open(number, 'w' if number else 'r', buffering=1))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:0] = environment.get('PYTHONPATH', '').split(os.pathsep)
    if arguments[0] == '-u':
        del arguments[0]
    if arguments[0] == '-m':
        sys.argv = arguments[1:]
        runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(sys.argv[0], run_name='__main__')
