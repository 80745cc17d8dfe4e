"""Processes that have already imported what takes seconds: torch, DeepSpeed, transformers and this package.

Most tests that start a command are about what it does, and not about how Python starts. `warm_python()` is a folder
with `python`, `torchrun` and `deepspeed`, which behave like the real ones for `python SCRIPT` and `python -m MODULE`,
but fork from one server a test session. The ranks that such a launcher starts are warm as well. The forked process has
arguments, environment, folder, streams, limits and signals of the one that it stands in for, a session of its own, and
ends as Python does. What it shares with its siblings: the seed of `hash`, and what was read from the environment at
import; a start that wants other values there gets a real process.
"""

from __future__ import annotations

import array
import atexit
import functools
import gc
import importlib
import io
import json
import logging
import os
import pkgutil
import resource
import runpy
import selectors
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import types
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

PROJECT = Path(__file__).parents[1]
CLIENT = Path(__file__).with_name("warm_python.py")
SERVE = "warm_server.serve()"  # what the server's process does
# Variables that Python or a library reads once, when it starts or is imported, and those that are seen to here.
READ_AT_IMPORT = ("ACCELERATE_", "CUDA", "DS_", "HF_", "KMP_", "LD_", "MKL_", "NCCL_", "OMP_", "PYTHON", "PYTORCH",
                  "TORCH", "TQDM_", "TRANSFORMERS_", "TRITON_")  # fmt: skip
SEEN_TO = ["PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED", "TORCHELASTIC_", "TORCH_NCCL_ASYNC",
           "TORCHINDUCTOR_COMPILE_THREADS"]  # fmt: skip
if not os.path.exists("/dev/nvidiactl"):
    # without a GPU they mean nothing; the deepspeed launcher sets the first
    SEEN_TO += ["CUDA_VISIBLE_DEVICES", "NCCL_SOCKET_IFNAME"]
# What ranks import in the course of their work, besides `local_ranks.IMPORTS`.
OF_RANKS = ["pytest", "torch.utils.cpp_extension", "torch.distributed._composable.replicate_with_fsdp",
            "torch.distributed.pipelining", "torch.profiler._cupti_monitor", "numpy.ctypeslib", "encodings.ascii",
            "deepspeed.comm.mori", "deepspeed.module_inject.auto_ep_layer", "deepspeed.utils.pin_memory",
            "megatron_tf.activations.built_in", "megatron_tf.activations.l2_norm_gelu",
            "megatron_tf.architectures.tokenformer.architecture", "megatron_tf.architectures.tokenformer.block",
            "megatron_tf.architectures.tokenformer.forms", "megatron_tf.architectures.transformer.block",
            "megatron_tf.architectures.tokenformer.work", "megatron_tf.engine.deepspeed.joining",
            "megatron_tf.engine.torch.engine", "megatron_tf.engine.torch.pipeline", "megatron_tf.optimizers.adamw_ema",
            "megatron_tf.optimizers.muon", "megatron_tf.tasks.language_model.checks",
            "megatron_tf.tasks.language_model.data", "megatron_tf.tasks.language_model.layers",
            "megatron_tf.verification.resume"]  # fmt: skip


@functools.cache
def hugging_face() -> dict[str, str]:
    """Variables of processes that tests start: a cache of the session's own, and no network."""
    folder = tempfile.mkdtemp(prefix="hugging-face-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return {"HF_HOME": folder, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@functools.cache
def warm_python() -> Path:
    """The folder with `python`, `torchrun` and `deepspeed`; the first call starts the server, which ends with us."""
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    place = folder / "socket"
    scripts = {
        "python": f'exec {sys.executable} -IS {CLIENT} {place} {sys.executable} "$@"',
        "torchrun": f'exec {folder}/python -m torch.distributed.run "$@"',
        "deepspeed": f'exec {folder}/python {Path(sys.executable).with_name("deepspeed")} "$@"',
    }
    for name, line in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(stat.S_IRWXU)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(place))
    listening.listen(64)
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, sys.argv[1]); import warm_server; {SERVE}"]
    kept = {
        k: v for k, v in os.environ.items() if k in ("HOME", "LANG", "LD_LIBRARY_PATH", "PATH", "PYTHONPATH", "TMPDIR")
    }
    server = subprocess.Popen(
        [*command, str(Path(__file__).parent), str(listening.fileno()), str(folder / "python")],
        env={**kept, **hugging_face(), "OMP_NUM_THREADS": "1"}, stdin=subprocess.PIPE, pass_fds=[listening.fileno()],
        start_new_session=True,
    )  # fmt: skip
    listening.close()
    atexit.register(end, server, folder)
    return folder


def end(server: subprocess.Popen, folder: Path) -> None:
    server.stdin.close()
    server.wait()
    for path in folder.iterdir():
        path.unlink(missing_ok=True)
    folder.rmdir()


def serve() -> None:
    """The server's main program: forks until its standard input ends, which it does with the test session."""
    _, listening, python = sys.argv[1:4]
    starting = dict(os.environ)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    base = [entry for entry in sys.path if entry not in ("", sys.argv[1], *search_path(starting))]
    sys.path.insert(0, str(PROJECT))
    import_everything()
    sys.executable = python
    gc.freeze()  # collections in forked processes would copy every page
    request = Server(socket.socket(fileno=int(listening)), starting).next_request()
    become(request, base)
    end_as_python_does(lambda: work(request))


def import_everything() -> None:
    """What commands import in seconds. What is not installed is passed over."""
    import megatron_tf
    from megatron_tf.telemetry.console import quiet_libraries

    quiet_libraries()
    from megatron_tf.runtime.local_ranks import IMPORTS

    names = [*IMPORTS, *OF_RANKS, "megatron_tf.__main__", "deepspeed.launcher.runner", "deepspeed.launcher.launch",
             "torch.distributed.run", "peft", "transformers.models.auto.modeling_auto",
             "transformers.models.llama.modeling_llama", "transformers.tokenization_utils_tokenizers",
             "transformers.generation.utils"]  # fmt: skip
    for name in ("adapters", "commands", "convert", "engine", "evaluation", "finetuning", "inference", "training"):
        package = importlib.import_module(f"megatron_tf.{name}")
        names += [module.name for module in pkgutil.walk_packages(package.__path__, f"megatron_tf.{name}.")]
    assert megatron_tf.__file__ == str(PROJECT / "megatron_tf" / "__init__.py"), megatron_tf.__file__
    for name in names:
        importlib.import_module(name)


class Server:
    """Forks for every client; kills what a client leaves behind."""

    def __init__(self, listening: socket.socket, starting: dict[str, str]):
        self.listening, self.starting = listening, starting
        self.imported = dict(os.environ)
        self.selector = selectors.DefaultSelector()
        self.selector.register(0, selectors.EVENT_READ)
        self.selector.register(listening, selectors.EVENT_READ)
        self.children: dict[int, tuple[int, socket.socket]] = {}  # by the descriptor of the process

    def next_request(self) -> dict:
        """Returns in the forked process only, with what its client asks for."""
        while True:
            for key, _ in self.selector.select():
                if key.fileobj == 0:
                    self.end()
                if key.fileobj is self.listening:
                    request = self.fork()
                    if request is not None:
                        return request
                elif key.fd in self.children:
                    self.ended(key.fd)
                elif key.data in self.children:
                    os.kill(self.children[key.data][0], signal.SIGKILL)
                    self.selector.unregister(key.fileobj)

    def end(self) -> NoReturn:
        for pid, _ in self.children.values():
            os.kill(pid, signal.SIGKILL)
        os._exit(0)

    def fork(self) -> dict | None:
        client, _ = self.listening.accept()
        try:
            request, streams = receive(client)
        except (ConnectionError, ValueError):
            client.close()
            return None
        pid = 0 if self.differs(request) else os.fork()
        if pid == 0 and not self.differs(request):
            return self.forked(request, streams)
        for stream in streams:
            os.close(stream)
        if pid == 0:
            client.close()
            return None
        process = os.pidfd_open(pid)
        self.children[process] = (pid, client)
        self.selector.register(process, selectors.EVENT_READ)
        self.selector.register(client, selectors.EVENT_READ, process)
        send(client, pid)
        return None

    def differs(self, request: dict) -> bool:
        """Whether the process that is asked for would have imported something else, or otherwise."""
        wanted = request["environment"]
        if not {*search_path(wanted)} <= {str(PROJECT), *search_path(self.starting)}:
            return True
        if character_set(wanted) != character_set(self.starting):
            return True
        names = [name for name in {*wanted, *self.imported} if name.startswith(READ_AT_IMPORT)]
        return any(
            wanted.get(name) not in (self.starting.get(name), self.imported.get(name))
            for name in names
            if not name.startswith(tuple(SEEN_TO))
        )

    def forked(self, request: dict, streams: list[int]) -> dict:
        self.selector.close()
        self.listening.close()
        for process, (_, client) in self.children.items():
            os.close(process)
            client.close()
        for stream, descriptor in enumerate(streams):
            os.dup2(descriptor, stream)
        for name in os.listdir("/proc/self/fd"):
            # the listing itself is one of them, and closed by now
            if int(name) > 2:
                try:
                    os.close(int(name))
                except OSError:
                    continue
        return request

    def ended(self, process: int) -> None:
        pid, client = self.children.pop(process)
        self.selector.unregister(process)
        os.close(process)
        _, status = os.waitpid(pid, 0)
        send(client, os.waitstatus_to_exitcode(status))
        if client in [key.fileobj for key in self.selector.get_map().values()]:
            self.selector.unregister(client)
        client.close()


def search_path(environment: dict[str, str]) -> list[str]:
    """Folders of PYTHONPATH."""
    return [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]


def character_set(environment: dict[str, str]) -> str:
    """The locale whose characters Python takes; it takes UTF-8 where none is set."""
    return environment.get("LC_ALL") or environment.get("LC_CTYPE") or environment.get("LANG") or "C.UTF-8"


def receive(client: socket.socket) -> tuple[dict, list[int]]:
    head, ancillary, _, _ = client.recvmsg(8, socket.CMSG_SPACE(3 * 4))
    streams = array.array("i")
    for _, _, data in ancillary:
        streams.frombytes(data)
    length, body = int.from_bytes(head, "little"), b""
    while len(body) < length:
        part = client.recv(length - len(body))
        if not part:
            raise ConnectionError
        body += part
    return json.loads(body), list(streams)


def send(client: socket.socket, number: int) -> None:
    try:
        client.sendall(number.to_bytes(8, "little", signed=True))
    except OSError:
        return


def become(request: dict, base: list[str]) -> None:
    """Turns the forked process into the one that was asked for."""
    os.setsid()
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    os.umask(request["umask"])
    # a shell has its jobs in the background ignore SIGINT and SIGQUIT, nohup has them ignore SIGHUP
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    for limit, pair in request["limits"]:
        if resource.getrlimit(limit) != tuple(pair):
            resource.setrlimit(limit, tuple(pair))
    open_streams(unbuffered=request["unbuffered"] or bool(os.environ.get("PYTHONUNBUFFERED")))
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    script = request["words"][0] if request["kind"] == "script" else None
    first = os.getcwd() if script is None else str(Path(script).resolve().parent)
    sys.path[:] = [first, *search_path(request["environment"]), *base]
    sys.argv[:] = request["words"]
    sys.orig_argv[:] = [sys.executable, *(["-m"] if script is None else []), *request["words"]]
    tempfile.tempdir = None
    seed_numpy()


def open_streams(unbuffered: bool) -> None:
    """Standard streams as a new Python makes them of its descriptors; libraries that log to the old ones follow."""

    def opened(old: io.TextIOWrapper, mode: str) -> io.TextIOWrapper:
        binary = open(old.fileno(), mode, 0 if unbuffered and mode == "wb" else -1, closefd=False)
        by_line = not unbuffered and (old is sys.stderr or os.isatty(old.fileno()))
        return io.TextIOWrapper(binary, old.encoding, old.errors, line_buffering=by_line, write_through=unbuffered)

    new = {
        sys.stdin: opened(sys.stdin, "rb"),
        sys.stdout: opened(sys.stdout, "wb"),
        sys.stderr: opened(sys.stderr, "wb"),
    }
    for logger in [logging.root, *logging.root.manager.loggerDict.values()]:
        for handler in getattr(logger, "handlers", ()):
            # one that has no stream of its own follows already
            if vars(handler).get("stream") in new:
                handler.stream = new[handler.stream]
    sys.stdin, sys.stdout, sys.stderr = sys.__stdin__, sys.__stdout__, sys.__stderr__ = new.values()


def seed_numpy() -> None:
    """The one generator that forked processes would share; Python's own is seeded anew in each."""
    import numpy

    numpy.random.seed()


def work(request: dict) -> None:
    """Runs the script or the module as the main program."""
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    if request["kind"] == "module":
        name = request["words"][0]
        sys.modules.pop(name, None)
        runpy._run_module_as_main(name)
        return
    script = os.path.abspath(request["words"][0])
    main.__dict__.update(__file__=script, __cached__=None, __builtins__=__builtins__)
    exec(compile(Path(script).read_bytes(), script, "exec"), main.__dict__)


def end_as_python_does(main_program: Callable[[], None]) -> None:
    """Ends the process after `main_program`, but does not take apart what is imported, which takes seconds as well."""
    code, interrupted = 0, False
    try:
        main_program()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if code and not isinstance(ended.code, int):
            print(ended.code, file=sys.stderr)
    except BaseException as error:
        code, interrupted = 1, isinstance(error, KeyboardInterrupt)
        sys.excepthook(type(error), error, error.__traceback__)
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except (OSError, ValueError) as error:
        print(f"Exception ignored in: {sys.stdout!r}\n{type(error).__name__}: {error}", file=sys.stderr)
        code = 120
    sys.stderr.flush()
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 0xFF)
