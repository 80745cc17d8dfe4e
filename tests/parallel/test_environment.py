from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from megatron_tf.errors import LaunchError
from megatron_tf.parallel.environment import LaunchEnvironment, check_port_free, detect, expand_hostlist

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_RUN_ID": "none",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
DEEPSPEED = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "4",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29400",
}
SRUN = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_JOB_NODELIST": "n[0-2]",
}


def without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


def test_torchrun_and_deepspeed():
    assert detect(TORCHRUN) == LaunchEnvironment("torchrun", 5, 8, 1, 4, "n1", 29400, agent_hosts_store=True)
    assert detect(DEEPSPEED) == LaunchEnvironment("deepspeed", 5, 8, 1, 4, "n1", 29400)
    assert detect(DEEPSPEED, argv_local_rank=1).local_rank == 1
    assert detect(without(DEEPSPEED, "LOCAL_RANK"), argv_local_rank=1).local_rank == 1


def test_variables_set_by_hand():
    environ = without(DEEPSPEED, "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")
    assert detect(environ) == LaunchEnvironment("python", 5, 8, 1, None, "n1", 29400)
    assert detect({**environ, **SRUN}).launcher == "srun"


def test_srun():
    assert detect(SRUN) == LaunchEnvironment("srun", 5, 8, 1, None, "n1", 23456)
    assert detect(without(SRUN, "SLURM_STEP_NODELIST")).master_addr == "n0"
    exported = detect({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"})
    assert (exported.master_addr, exported.master_port) == ("10.0.0.1", 4000)


def test_one_process():
    assert detect({}) == LaunchEnvironment("python", 0, 1, 0, 1, "127.0.0.1", 0)
    assert detect({"MASTER_PORT": "4000"}).master_port == 4000
    alone = detect({**SRUN, "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"})
    assert alone == LaunchEnvironment("srun", 0, 1, 0, None, "127.0.0.1", 0)


BATCH_STEPS = [{}, {"SLURM_STEP_ID": "4294967291"}, {"SLURM_STEP_ID": "4294967290"}, {"SLURM_STEP_ID": "batch"}]


@pytest.mark.parametrize("step", BATCH_STEPS)
def test_plain_python_inside_an_allocation(step):
    environ = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", **step}
    assert detect(environ).launcher == "python"
    assert detect({**environ, "SLURM_NTASKS": "1"}).world_size == 1
    with pytest.raises(LaunchError, match=r"SLURM_NTASKS=4 .*srun python launch/train\.py"):
        detect({**environ, "SLURM_NTASKS": "4"})
    # a launcher that the batch script started is believed
    assert detect({**environ, "SLURM_NTASKS": "4", **DEEPSPEED}).launcher == "deepspeed"


def test_torchrun_under_srun_with_one_task_a_node():
    step = {**SRUN, "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    assert detect({**step, **TORCHRUN}) == detect(TORCHRUN)


def test_every_task_believes_to_be_alone():
    alone = {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert detect(alone).world_size == 1
    with pytest.raises(LaunchError, match=r"RANK=0 and WORLD_SIZE=1 .*SLURM_NTASKS=8"):
        detect({**SRUN, **alone})


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({**TORCHRUN, "RANK": "8"}, r"RANK=8 must be below WORLD_SIZE=8"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, r"LOCAL_RANK=4 must be below LOCAL_WORLD_SIZE=4"),
        ({**DEEPSPEED, "LOCAL_RANK": "4"}, r"LOCAL_RANK=4 must be below LOCAL_SIZE=4"),
        ({**TORCHRUN, "RANK": "0"}, r"LOCAL_RANK=1 cannot be above RANK=0"),
        ({"WORLD_SIZE": "4"}, r"WORLD_SIZE=4 set, but not RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        (without(TORCHRUN, "MASTER_ADDR"), r"RANK=5, WORLD_SIZE=8, LOCAL_RANK=1 set, but not MASTER_ADDR"),
        (without(TORCHRUN, "LOCAL_RANK"), r"not LOCAL_RANK"),
        ({**TORCHRUN, "RANK": "-1"}, r"RANK='-1' is not an integer"),
        ({**TORCHRUN, "WORLD_SIZE": "two"}, r"WORLD_SIZE='two' is not an integer"),
        ({**TORCHRUN, "MASTER_PORT": ""}, r"MASTER_PORT='' is not an integer"),
        ({**TORCHRUN, "MASTER_PORT": "70000"}, r"MASTER_PORT=70000 is outside"),
        ({**TORCHRUN, "MASTER_ADDR": " "}, r"MASTER_ADDR is empty"),
        ({**SRUN, "MASTER_ADDR": ""}, r"MASTER_ADDR is empty"),
        ({**SRUN, "SLURM_PROCID": "8"}, r"SLURM_PROCID=8 must be below SLURM_NTASKS=8"),
        ({**SRUN, "SLURM_NTASKS": "x"}, r"SLURM_NTASKS='x' is not an integer"),
        (without(SRUN, "SLURM_LOCALID"), r"SLURM_STEP_ID=0 .*SLURM_LOCALID is not set"),
        (without(SRUN, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"), r"Neither MASTER_ADDR nor"),
        ({**SRUN, "SLURM_STEP_NODELIST": "n[1-"}, r"'n\[1-' cannot be read"),
    ],
)
def test_contradictions(environ, message):
    with pytest.raises(LaunchError, match=message):
        detect(environ)


def test_local_rank_argument_that_contradicts():
    with pytest.raises(LaunchError, match=r"--local_rank=0 contradicts the local rank 1"):
        detect(TORCHRUN, argv_local_rank=0)
    with pytest.raises(LaunchError, match=r"--local_rank=3 contradicts the local rank 0 .*python"):
        detect({}, argv_local_rank=3)


def test_only_the_process_that_listens_needs_a_free_port():
    assert detect({**DEEPSPEED, "RANK": "0", "LOCAL_RANK": "0"}).opens_port
    assert not detect(DEEPSPEED).opens_port
    assert not detect({**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0"}).opens_port


def test_variables_describe_the_same_place():
    place = detect(SRUN)
    again = detect(place.variables())
    assert (again.rank, again.world_size, again.local_rank) == (place.rank, place.world_size, place.local_rank)
    assert (again.master_addr, again.master_port) == (place.master_addr, place.master_port)


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("gpu02", ["gpu02"]),
        ("n[1-3,7],gpu02", ["n1", "n2", "n3", "n7", "gpu02"]),
        ("n[08-11]", ["n08", "n09", "n10", "n11"]),
        ("n[9-10,007]", ["n9", "n10", "n007"]),
        ("r[1-2]n[1,3]-ib,head", ["r1n1-ib", "r1n3-ib", "r2n1-ib", "r2n3-ib", "head"]),
        ("a-1,b.cluster.org", ["a-1", "b.cluster.org"]),
    ],
)
def test_hostlist(text, hosts):
    assert expand_hostlist(text) == hosts


@pytest.mark.parametrize("text", ["", "n1,,n2", "n[]", "n[3-1]", "n[a-b]", "n[1-2", "n1-2]", "n[1[2]]"])
def test_broken_hostlist(text):
    with pytest.raises(LaunchError, match="cannot be read"):
        expand_hostlist(text)


def test_port_in_use():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(LaunchError, match=rf"MASTER_PORT={port} is in use on localhost.*--master_port"):
            check_port_free("localhost", port)
    check_port_free("localhost", port)
    check_port_free("localhost", 0)


def test_unknown_host():
    with pytest.raises(LaunchError, match=r"MASTER_ADDR=no-such-host\.invalid cannot be resolved"):
        check_port_free("no-such-host.invalid", 29500)


def test_detects_without_torch():
    script = "import sys, megatron_tf.parallel.environment; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], env=dict(os.environ), timeout=60).returncode == 0
