"""The client of `warm_server`: stands in for `python SCRIPT ...` or `python -m MODULE ...`.

Started as `python -IS warm_python.py SOCKET PYTHON ...`, because it must start in milliseconds. The server forks a
process that does the work; this one passes it the arguments, environment, folder, limits and open streams, hands
signals on, and ends as it ends. Where the server cannot stand in (see `warm_server.differs`) PYTHON does the work
itself. SIGSTOP and SIGKILL cannot be handed on: a file SOCKET.PID, with this one's number, has that of the process.
"""

import array
import contextlib
import json
import os
import resource
import signal
import socket
import sys

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
LIMITS = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]


def main(place, python, *words):
    """Ends this process as the one that the server forks for it ends."""
    kind, first = script_or_module(words)
    if kind is None or any(closed(stream) for stream in range(3)):
        os.execv(python, [python, *words])
    ignored = [int(number) for number in signal.valid_signals() if signal.getsignal(number) is signal.SIG_IGN]
    signals = Signals(set(FORWARDED) - set(ignored))
    request = {
        "kind": kind, "words": words[first:], "unbuffered": "-u" in words[:first], "environment": dict(os.environ),
        "folder": os.getcwd(), "umask": os.umask(0), "ignored": ignored,
        "limits": [(limit, resource.getrlimit(limit)) for limit in LIMITS],
    }  # fmt: skip
    os.umask(request["umask"])
    server = socket.socket(socket.AF_UNIX)
    try:
        server.connect(place)
    except OSError:
        os.execv(python, [python, *words])
    body = json.dumps(request).encode()
    streams = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0, 1, 2]))
    server.sendmsg([len(body).to_bytes(8, "little")], [streams])
    server.sendall(body)
    pid = number_from(server)
    if pid is None:
        os.execv(python, [python, *words])
    note = f"{place}.{os.getpid()}"
    with open(f"{note}.partial", "w") as file:
        file.write(str(pid))
    # who looks for it finds the whole number, or nothing
    os.rename(f"{note}.partial", note)
    signals.go_to(pid)
    status = number_from(server)
    if status is None:
        sys.exit("the server of warm processes has ended")
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


class Signals:
    """Hands signals on, those too that come before the process is there."""

    def __init__(self, numbers):
        self.pid, self.early = None, []
        for number in numbers:
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        if self.pid is None:
            self.early.append(number)
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def go_to(self, pid):
        self.pid = pid
        for number in self.early:
            self.receive(number, None)


def script_or_module(words):
    """("script" or "module", index of its name among `words`); (None, 0) for any other use of Python."""
    for index, word in enumerate(words):
        if word == "-u":
            continue
        if word == "-m":
            return "module", index + 1
        return (None, 0) if word.startswith("-") else ("script", index)
    return None, 0


def closed(stream):
    try:
        os.fstat(stream)
    except OSError:
        return True
    return False


def number_from(server):
    """The next number that the server sends; None when it has none for us."""
    data = server.recv(8)
    return int.from_bytes(data, "little", signed=True) if len(data) == 8 else None


if __name__ == "__main__":
    main(*sys.argv[1:])
