"""A real SLURM cluster for tests, on this one machine and gone without a trace when it is closed.

Each node lives in namespaces of its own (network, host name, processes, mounts, shared memory), so it has a host name
that others reach it by, its power can be cut and its cable pulled. Nothing outside of a temporary folder is written,
and neither systemd nor cgroups are needed, but root is.
"""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from launching import PROJECT, environment
from live import PATIENCE_SECONDS, until
from prepared import write_tokens

REQUIRED = "MEGATRON_TF_TESTS_NEED_SLURM"  # set where a skip would hide that nothing was tested
PROGRAMS = ("unshare", "nsenter", "setpriv", "ip", "munged", "slurmctld", "slurmd", "sbatch")
CONTROL_ADDRESS = "10.99.0.254"
CPUS = 4  # a node claims more than the machine may have, see config_overrides
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")

# cred_expire: a requeued job waits this long (and a second) before it starts again; below 5 the default of 120 counts.
# config_overrides: believe the CPUs and memory claimed here. ReturnToService: a node that comes back is idle at once.
# MessageTimeout: an order to end a step is answered when its ranks are gone. Without an answer in time SLURM repeats it
# later, and may hit the step of the job's next start. linuxproc, task/none: no cgroups.
SLURM_CONF = """
ClusterName=test
SlurmctldHost=control({control})
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={work}/run/munge.socket,cred_expire=5
StateSaveLocation={work}/state
SlurmdSpoolDir={work}/spool/%n
SlurmctldPidFile={work}/run/slurmctld.pid
SlurmdPidFile={work}/run/slurmd.%n.pid
SlurmctldLogFile={work}/log/slurmctld
SlurmdLogFile={work}/log/slurmd.%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2,sched_min_interval=0
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout={patience}
MessageTimeout={patience}
TCPTimeout=2
KillWait={kill_wait}
MinJobAge=600
GresTypes=gpu
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

CONTROL = """
set -eu
ip link set lo up
ip link add bridge0 type bridge
ip addr add {control}/24 dev bridge0
ip link set bridge0 up
hostname control
mount --bind {work}/hosts /etc/hosts
touch {work}/run/control.ready
{reap}
"""

# The node's end of the cable is plugged in from outside.
NODE = """
set -eu
hostname {name}
ip link set lo up
mount -t tmpfs shm /dev/shm
touch {work}/run/{name}.ready
until ip link show eth0 >/dev/null 2>&1; do sleep 0.02; done
ip addr add {address}/24 dev eth0
ip link set eth0 up
slurmd -N {name}
{reap}
"""
REAP = "while :; do sleep 3600 & wait $! || :; done"  # the first process of a namespace inherits its orphans


@dataclass(frozen=True)
class Rank:
    """A process of a job. `pid` is what pytest sees, from outside of the cluster."""

    number: int
    node: str
    pid: int

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def has_waiting(self, number: int) -> bool:
        """Whether the signal was sent to it, and it could not take notice yet."""
        return bool(int(_status(self.pid, "ShdPnd"), 16) >> (number - 1) & 1)


class Cluster:
    """Nodes n1, n2, ... of 4 CPUs and 2 GPUs that are none. Use in a `with`; everything in it dies with the block.

    `kill_wait`: seconds from the order to end until SIGKILL; with fewer, a node that is gone is noticed sooner too.
    """

    def __init__(self, work: Path, num_nodes: int, kill_wait: int = 25):
        self.work, self._kill_wait = work.resolve(), kill_wait
        self.addresses = {f"n{number}": f"10.99.0.{number}" for number in range(1, num_nodes + 1)}
        self._control: subprocess.Popen | None = None
        self._control_pid = 0
        self._nodes: dict[str, tuple[subprocess.Popen, int]] = {}

    def __enter__(self) -> Cluster:
        try:
            self._write_files()
            self._start_control()
            for name in self.addresses:
                self.power_on(name)
            num_nodes = len(self.addresses)
            self.until(lambda: self.run("sinfo -h -o '%D %T'", check=False).strip() == f"{num_nodes} idle")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """The first process of the control namespace takes all others with it, orphans of nodes too."""
        if self._control is not None:
            self._control.kill()
            self._control.wait()
        for process, _ in self._nodes.values():
            process.wait()

    def run(self, command: str, *, node: str | None = None, check: bool = True) -> str:
        """What the shell `command` prints on `node`, or on the control machine."""
        pid = self._nodes[node][1] if node else self._control_pid
        result = subprocess.run(
            [*_inside(pid), "bash", "-c", command], env=self._environment(), cwd=PROJECT, text=True,
            timeout=PATIENCE_SECONDS, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert not check or result.returncode == 0, f"{command}: exit code {result.returncode}\n{result.stdout}"
        return result.stdout

    def until(self, condition: Callable[[], object], seconds: float = PATIENCE_SECONDS, job: str | None = None) -> None:
        """Waits for `condition`; fails with what the cluster and `job` have said."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail(f"nothing happened for {seconds:g} seconds\n{self.report(job)}")
            time.sleep(0.05)

    # Jobs

    def submit(self, *words: object, options: str = "", chdir: Path = PROJECT, script: str = "train.sbatch") -> str:
        """Submits a script of launch/slurm with the arguments `words`; returns the job's number."""
        arguments = " ".join(f"'{word}'" for word in words)
        output = f"{self.work}/job-%j.out"
        command = f"sbatch --parsable --output={output} --chdir={chdir} {options} {PROJECT}/launch/slurm/{script}"
        return self.run(f"{command} {arguments}").strip()

    def state(self, job: str) -> str:
        return self.run(f"squeue -h -j {job} -t all -o %T", check=False).strip()

    def restarts(self, job: str) -> int:
        return int(self._field(job, "Restarts"))

    def exit_code(self, job: str) -> int:
        return int(self._field(job, "ExitCode").partition(":")[0])

    def hosts(self, job: str) -> str:
        return self.run(f"squeue -h -j {job} -t all -o %N").strip()

    def output(self, job: str) -> str:
        path = self.work / f"job-{job}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, job: str, expected: str = "COMPLETED", seconds: float = PATIENCE_SECONDS) -> None:
        """Waits until the job is over, and in the state `expected`."""
        self.until(lambda: self.state(job) in OVER, seconds, job)
        assert self.state(job) == expected, self.report(job)

    def warn(self, job: str) -> None:
        """What SLURM does ahead of a job's limit: the signal of --signal=B:USR1@..., to the script alone."""
        self.run(f"scancel --batch --signal=USR1 {job}")

    def report(self, job: str | None = None) -> str:
        """Everything that tells why a test failed."""
        parts = [self.run("sinfo -N -l; squeue -t all", check=False)]
        if job is not None:
            parts += [self.run(f"scontrol show job {job}", check=False), self.output(job)[-8000:]]
        parts += [f"{path.name}:\n{path.read_text(errors='replace')[-1500:]}" for path in self.work.glob("log/slurm*")]
        return "\n\n".join(parts)

    def _field(self, job: str, name: str) -> str:
        words = self.run(f"scontrol show job {job}").split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    # Nodes

    def power_on(self, name: str) -> None:
        ready = self.work / "run" / f"{name}.ready"
        ready.unlink(missing_ok=True)
        script = self.work / f"{name}.sh"
        script.write_text(NODE.format(name=name, address=self.addresses[name], work=self.work, reap=REAP))
        namespaces = [
            "unshare",
            "--net",
            "--uts",
            "--mount",
            "--ipc",
            "--pid",
            "--fork",
            "--mount-proc",
            "--kill-child",
        ]
        process = subprocess.Popen(
            [*_inside(self._control_pid), *namespaces, "bash", script],
            env=self._environment(),
            stdin=subprocess.DEVNULL,
        )
        self._nodes[name] = process, 0
        self.until(ready.exists)
        first = _only_child(_only_child(process.pid))  # nsenter, which forks for the pid namespace; unshare; the script
        self._nodes[name] = process, first
        own_number = _status(first, "NSpid").split()[1]  # as the control machine sees it
        cable = f"cable_{name}"
        self.run(f"ip link add {cable} type veth peer name eth0 netns {own_number}")
        self.run(f"ip link set {cable} master bridge0 up")

    def cut_power(self, name: str) -> None:
        process, first = self._nodes.pop(name)
        os.kill(first, signal.SIGKILL)
        process.wait()

    def pull_cable(self, name: str) -> None:
        """Everything on the node runs on, and nobody hears of it."""
        self.run(f"ip link set cable_{name} nomaster")

    def plug_in(self, name: str) -> None:
        self.run(f"ip link set cable_{name} master bridge0")

    def ranks(self, job: str, start: int = 0) -> list[Rank]:
        """The processes of a start of `job` (0 is the first), in the order of their ranks, wherever they are alive."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                program = (folder / "cmdline").read_bytes().split(b"\0")[0]
                pairs = (line.partition("=") for line in (folder / "environ").read_text().split("\0"))
            except OSError:  # it has just ended
                continue
            has = {name: value for name, _, value in pairs}
            if (
                Path(os.fsdecode(program)).name.startswith("python")
                and (has.get("SLURM_CONF"), has.get("SLURM_JOB_ID")) == (str(self.work / "slurm.conf"), job)
                and int(has.get("SLURM_RESTART_COUNT", 0)) == start
            ):
                found.append(Rank(int(has["SLURM_PROCID"]), has["SLURMD_NODENAME"], int(folder.name)))
        return sorted(found, key=lambda rank: rank.number)

    # Starting

    def _write_files(self) -> None:
        for folder in ("run", "state", "spool", "log", "key", "devices"):
            (self.work / folder).mkdir(parents=True)
        key = self.work / "key" / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        key.parent.chmod(0o700)  # munge refuses a key that others could reach, and a socket that they could not
        hosts = {"localhost": "127.0.0.1", "control": CONTROL_ADDRESS, **self.addresses}
        (self.work / "hosts").write_text("".join(f"{address} {name}\n" for name, address in hosts.items()))
        lines = [f"NodeName={name} NodeAddr={address} CPUs={CPUS} RealMemory=8000 Gres=gpu:2"
                 for name, address in self.addresses.items()]  # fmt: skip
        settings = SLURM_CONF.format(
            work=self.work,
            control=CONTROL_ADDRESS,
            kill_wait=self._kill_wait,
            patience=2 * self._kill_wait,
            nodes="\n".join(lines),
        )
        (self.work / "slurm.conf").write_text(settings)
        devices = [self.work / "devices" / f"gpu{number}" for number in range(2)]
        for device in devices:  # SLURM hands out devices, so these must be some
            os.mknod(device, stat.S_IFCHR | 0o600, os.makedev(1, 3))
        names = ",".join(self.addresses)
        (self.work / "gres.conf").write_text(
            "AutoDetect=off\n" + "".join(f"NodeName={names} Name=gpu File={device}\n" for device in devices)
        )

    def _start_control(self) -> None:
        script = self.work / "control.sh"
        script.write_text(CONTROL.format(control=CONTROL_ADDRESS, work=self.work, reap=REAP))
        # setpriv: when pytest itself is killed, the cluster ends with it
        self._control = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--mount", "--uts", "--pid", "--fork",
             "--mount-proc",
             "--kill-child", "bash", script], stdin=subprocess.DEVNULL,
        )  # fmt: skip
        until((self.work / "run" / "control.ready").exists, "the control machine was there", self._control)
        self._control_pid = _only_child(self._control.pid)
        run, key, log = (self.work / folder for folder in ("run", "key", "log"))
        self.run(  # --force: pytest's folders are closed to others, who have no business here
            f"munged --force --key-file={key}/munge.key --socket={run}/munge.socket --pid-file={run}/munged.pid "
            f"--log-file={log}/munged --seed-file={key}/seed"
        )
        self.run("slurmctld")

    def _environment(self) -> dict[str, str]:
        return environment(SLURM_CONF=str(self.work / "slurm.conf"))


def _inside(pid: int) -> list[str]:
    return ["nsenter", "--target", str(pid), "--net", "--mount", "--uts", "--ipc", "--pid"]


def _only_child(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children")
    until(lambda: children.read_text().split(), f"process {pid} started another")
    return int(children.read_text().split()[0])


def _status(pid: int, name: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(line.partition(":")[2] for line in lines if line.startswith(f"{name}:"))


def why_not() -> str | None:
    """Why there can be no cluster here; None when there can."""
    if os.getuid() != 0:
        return "a SLURM cluster of namespaces needs root"
    if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
        return f"a SLURM cluster needs {', '.join(missing)}; .ci/run installs them"
    attempt = subprocess.run(["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc", "ip",
                              "link", "add", "bridge0", "type", "bridge"], capture_output=True, text=True)  # fmt: skip
    return f"no namespaces for a SLURM cluster: {attempt.stderr.strip()}" if attempt.returncode else None


CONFIG = """
run: {{dir: {folder}/run, name: test}}
model:
  num_layers: 2
  hidden_size: 32
  num_attention_heads: 4
  seq_length: 16
  vocab_size: 99
  parameter_tokens: {{qkv: 13, proj: 11, ffn: 37}}
parallel: {{tensor: 2, timeout_seconds: 60}}
training: {{train_steps: 40, global_batch_size: 8, micro_batch_size: 2, precision: fp32}}
optimizer: {{lr: 1e-2, schedule: {{warmup_steps: 2}}}}
data:
  train: [{{path: {folder}/tokens}}]
checkpoint: {{interval_steps: 5, keep_last: 3}}
logging: {{interval_steps: 1}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder to submit from: with the project's launch/, config.yml and prepared data of 4,000 tokens below 99."""
    path = tmp_path_factory.mktemp("run")
    write_tokens(path / "tokens")
    (path / "config.yml").write_text(CONFIG.format(folder=path))
    (path / "launch").symlink_to(PROJECT / "launch")
    return path


@pytest.fixture(scope="session")
def _slurm_is_here():
    if reason := why_not():
        (pytest.fail if os.environ.get(REQUIRED) else pytest.skip)(reason)


@pytest.fixture(scope="module")
def start_cluster(_slurm_is_here, tmp_path_factory):
    """A function that starts a `Cluster`, which runs until the module's tests are over; its arguments are Cluster's."""
    with ExitStack() as closing:
        yield lambda *how: closing.enter_context(Cluster(tmp_path_factory.mktemp("slurm") / "cluster", *how))
