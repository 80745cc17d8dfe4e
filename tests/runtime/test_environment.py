from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from live import PATIENCE_SECONDS

from megatron_tf.errors import LaunchError, UserError
from megatron_tf.runtime import environment
from megatron_tf.runtime.environment import (
    LaunchEnvironment,
    check_port_free,
    detect,
    notice_of,
    one_message,
    wait_for_port,
)

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_RUN_ID": "none",
    "GROUP_WORLD_SIZE": "2",
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
    assert detect(TORCHRUN) == LaunchEnvironment("torchrun", 5, 8, 1, 4, "n1", 29400)
    assert detect(DEEPSPEED) == LaunchEnvironment("deepspeed", 5, 8, 1, 4, "n1", 29400)


def test_another_launcher_is_never_a_run_of_one_process():
    environ = without(DEEPSPEED, "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")
    assert detect(environ) == LaunchEnvironment("deepspeed", 5, 8, 1, None, "n1", 29400)


KUBEFLOW = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456"}


def test_a_pod_of_one_process_needs_no_local_rank():
    assert detect(KUBEFLOW) == LaunchEnvironment("deepspeed", 1, 2, 0, None, "job-master-0", 23456)
    assert detect({**KUBEFLOW, "LOCAL_WORLD_SIZE": "1"}).local_rank == 0
    # several on a machine would all take the first GPU
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_SIZE"):
        with pytest.raises(LaunchError, match=r"RANK=1, WORLD_SIZE=2 set, but not LOCAL_RANK\..*set LOCAL_RANK=0"):
            detect({**KUBEFLOW, name: "2"})


def test_srun():
    assert detect(SRUN) == LaunchEnvironment("srun", 5, 8, 1, None, "n1", 23456)
    assert detect(without(SRUN, "SLURM_STEP_NODELIST")).master_addr == "n0"
    exported = detect({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"})
    assert (exported.master_addr, exported.master_port) == ("10.0.0.1", 4000)
    job = without({**SRUN, "SLURM_JOB_ID": "7"}, "SLURM_STEP_NODELIST")
    assert (detect(job).master_addr, detect(job).master_port) == ("n0", 20007)
    # an orphan of the start before may still hold that start's port
    ports = [detect({**job, "SLURM_RESTART_COUNT": str(count)}).master_port for count in range(3)]
    assert ports == [20007, 21004, 22001]


def test_steps_of_one_job_meet_apart():
    steps = [detect({**SRUN, "SLURM_STEP_ID": str(step)}) for step in range(40)]
    assert len({step.master_port for step in steps}) == len({step.run for step in steps}) == 40
    assert all(20000 <= step.master_port < 30000 for step in steps)
    assert steps[3].run == "step 3 of SLURM job 123456, start 0"
    assert detect({**SRUN, "SLURM_RESTART_COUNT": "2"}).run == "step 0 of SLURM job 123456, start 2"
    elastic = {**TORCHRUN, "TORCHELASTIC_RUN_ID": "sweep", "TORCHELASTIC_RESTART_COUNT": "1"}
    assert [detect(environ).run for environ in (elastic, TORCHRUN, DEEPSPEED)] == [
        "torchrun's run sweep, start 1",
        "",
        "",
    ]


def test_rank_0_on_another_node_than_the_first():
    components = {"SLURM_HET_SIZE": "2", "SLURM_JOB_NODELIST_HET_GROUP_0": "n2", "SLURM_JOB_NODELIST_HET_GROUP_1": "n1"}
    place = detect({**SRUN, **components})
    assert (place.master_addr, place.address_from) == ("n2", "SLURM_JOB_NODELIST_HET_GROUP_0")
    assert detect(SRUN).address_from == "SLURM_STEP_NODELIST"
    assert detect({**SRUN, **components, "MASTER_ADDR": "n7"}).address_from == "MASTER_ADDR"


def test_ranks_of_this_node_under_srun():
    assert detect({**SRUN, "SLURM_NTASKS_PER_NODE": "4"}).local_world_size == 4
    # the allocation's number, which this step cannot have
    assert detect({**SRUN, "SLURM_NTASKS_PER_NODE": "16"}).local_world_size is None
    assert detect({**SRUN, "SLURM_NTASKS_PER_NODE": "1"}).local_world_size is None


def test_rank_variables_exported_by_a_script_under_srun():
    """They may repeat what srun says, and give each task one visible GPU; else they are left over from elsewhere."""
    same = {**SRUN, "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "0"}
    assert detect(same) == LaunchEnvironment("srun", 5, 8, 0, None, "n1", 23456)
    for name, value, slurm in (("RANK", "0", "SLURM_PROCID=5"), ("WORLD_SIZE", "1", "SLURM_NTASKS=8")):
        with pytest.raises(LaunchError, match=rf"{name}={value} contradicts {slurm} of srun.*Unset"):
            detect({**same, name: value})
        with pytest.raises(LaunchError, match=rf"{name}={value} contradicts {slurm}"):
            detect({**SRUN, name: value})


def test_one_process():
    assert detect({}) == LaunchEnvironment("python", 0, 1, 0, 1, "127.0.0.1", 0)
    assert detect({"MASTER_ADDR": "n7", "MASTER_PORT": "4000"}) == detect({})  # left over in the shell
    alone = detect({**SRUN, "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"})
    assert alone == LaunchEnvironment("srun", 0, 1, 0, None, "127.0.0.1", 0)


@pytest.mark.parametrize(
    "left_over",
    [
        {"WORLD_SIZE": "1"},
        {"WORLD_SIZE": " 1 ", "RANK": "0"},
        {"WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "x"},
    ],
)
def test_a_world_size_of_one_left_over_in_a_shell(left_over):
    assert detect(left_over) == detect({})
    with pytest.raises(LaunchError, match=r"RANK=3, WORLD_SIZE= ?1 ?.* set, but not"):
        detect({**left_over, "RANK": "3"})
    with pytest.raises(LaunchError, match="OMPI_COMM_WORLD_SIZE=4"):
        detect({**left_over, "OMPI_COMM_WORLD_SIZE": "4"})
    with pytest.raises(LaunchError, match="SLURM_NTASKS=4"):
        detect({**left_over, "SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"})


def test_one_process_of_any_launcher_needs_no_meeting_point():
    """Where it lies, and whether it is a port at all, is of no interest."""
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "x"}
    assert detect(place) == LaunchEnvironment("deepspeed", 0, 1, 0, None, "127.0.0.1", 0)
    assert detect({**place, "TORCHELASTIC_RUN_ID": "none"}) == LaunchEnvironment(
        "torchrun", 0, 1, 0, None, "127.0.0.1", 0
    )
    step = {**SRUN, "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}
    elsewhere = {"MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "x"}
    assert detect({**step, **elsewhere}) == LaunchEnvironment("srun", 0, 1, 0, None, "127.0.0.1", 0)


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


@pytest.mark.parametrize("environ", [TORCHRUN, DEEPSPEED], ids=["torchrun", "deepspeed"])
def test_a_launcher_under_srun_with_one_task_a_node(environ):
    step = {**SRUN, "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}
    assert detect({**step, **environ}) == detect(environ)
    # `srun --pty bash` is a step of one task in which a person starts a launcher
    assert detect({**step, "SLURM_NTASKS": "1", "SLURM_PROCID": "0", **environ}) == detect(environ)


@pytest.mark.parametrize("environ", [TORCHRUN, DEEPSPEED], ids=["torchrun", "deepspeed"])
def test_every_task_a_run_of_its_own(environ):
    alone = {**environ, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    alone |= {
        name: "1" for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "GROUP_WORLD_SIZE", "CROSS_SIZE") if name in alone
    }
    assert detect(alone).world_size == 1
    with pytest.raises(LaunchError, match=r"RANK=0 and WORLD_SIZE=1 .*SLURM_NTASKS=8"):
        detect({**SRUN, **alone})
    with pytest.raises(LaunchError, match=r"WORLD_SIZE=8 with \w+_SIZE=1 .*SLURM_NTASKS=2"):
        detect({**SRUN, "SLURM_NTASKS": "2", **alone, "WORLD_SIZE": "8"})


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_mpirun_does_not_start_many_runs_of_one(name):
    assert detect({name: "1"}) == detect({})
    with pytest.raises(LaunchError, match=rf"{name}=4 .*train alone.*deepspeed launch/train\.py"):
        detect({name: "4"})
    assert detect({**DEEPSPEED, name: "8"}).launcher == "deepspeed"
    left_over = {**DEEPSPEED, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "CROSS_SIZE": "1"}
    with pytest.raises(LaunchError, match=rf"{name}=4 but RANK=0 and WORLD_SIZE=1.*train alone"):
        detect({**left_over, name: "4"})


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK"])
def test_one_of_many_mpi_processes_whose_number_is_not_given(name):
    assert detect({name: "0"}) == detect({})
    with pytest.raises(LaunchError, match=rf"{name}=2 .*train alone"):
        detect({name: "2"})


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
        (without(SRUN, "SLURM_NTASKS"), r"SLURM_STEP_ID=0 .*SLURM_NTASKS is not set"),
        ({**TORCHRUN, "WORLD_SIZE": "0"}, r"RANK=5 must be below WORLD_SIZE=0"),
        (without(SRUN, "SLURM_LOCALID"), r"SLURM_STEP_ID=0 .*SLURM_LOCALID is not set"),
        (without(SRUN, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"), r"Neither MASTER_ADDR nor"),
        ({**SRUN, "SLURM_STEP_NODELIST": "n[1-"}, r"'n\[1-' cannot be read"),
    ],
)
def test_contradictions(environ, message):
    with pytest.raises(LaunchError, match=message):
        detect(environ)


def test_port_in_use():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        with pytest.raises(LaunchError, match=rf"MASTER_PORT={port} is in use on localhost.*--master_port"):
            check_port_free("localhost", port)
    check_port_free("localhost", port)
    check_port_free("localhost", 0)


def test_port_in_use_on_another_address():
    """torch.distributed listens on all addresses, so a listener on any of them is in its way."""
    with socket.create_server(("127.0.0.2", 0)) as listener, pytest.raises(LaunchError, match="is in use"):
        check_port_free("127.0.0.1", listener.getsockname()[1])


def test_address_of_another_machine():
    never_assigned = "192.0.2.1"
    with pytest.raises(LaunchError, match=r"MASTER_ADDR=192\.0\.2\.1 .*not an address of this machine"):
        check_port_free(never_assigned, 29500)


def test_unknown_host():
    with pytest.raises(LaunchError, match=r"MASTER_ADDR=no-such-host\.invalid cannot be resolved"):
        check_port_free("no-such-host.invalid", 29500)


def test_waiting_for_a_port_that_opens_later():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        opening = threading.Timer(0.7, listener.listen)
        opening.start()
        wait_for_port("127.0.0.1", listener.getsockname()[1], 20)
        opening.join()


@pytest.fixture
def clock(monkeypatch):
    """[seconds], in place of the time that passes while a rank waits: a loaded machine takes more of it."""
    passed = [0.0]

    def sleep(seconds):
        passed[0] += seconds

    monkeypatch.setattr(environment, "time", SimpleNamespace(monotonic=lambda: passed[0], sleep=sleep))
    return passed


def test_nobody_listens(clock):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        with pytest.raises(
            LaunchError, match=rf"MASTER_ADDR=127\.0\.0\.1, MASTER_PORT={port} within 1 seconds.*refused"
        ):
            wait_for_port("127.0.0.1", port, 1)
        assert clock == [1.0]


def test_for_whom_a_rank_waits_is_said_once(monkeypatch, capsys, clock):
    """By rank 1 and the first rank of each node, that of thousands not all say the same."""
    monkeypatch.setattr(environment, "NOTICE_SECONDS", 0.1)
    who = [LaunchEnvironment("torchrun", rank, 16, rank % 8, 8, "127.0.0.1", 1) for rank in (1, 2, 8)]
    assert [notice_of(rank) is not None for rank in who] == [True, False, True]
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        with pytest.raises(LaunchError):
            wait_for_port("127.0.0.1", port, 1.6, notice=notice_of(who[0]))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rank 1 of 16 has waited ") and line.endswith("up to 1.6: parallel.timeout_seconds")
    assert f"for rank 0 at MASTER_ADDR=127.0.0.1, MASTER_PORT={port} (Connection refused)" in line


def test_waiting_for_an_unknown_host_ends_at_once(clock):
    with pytest.raises(LaunchError, match=r"MASTER_ADDR=no-such-host\.invalid cannot be resolved"):
        wait_for_port("no-such-host.invalid", 29500, 60)
    assert clock == [0.0]


def test_detects_without_torch():
    script = "import sys, megatron_tf.runtime.environment; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", script], env=dict(os.environ), timeout=PATIENCE_SECONDS).returncode == 0
    )


def test_a_users_mistake_is_said_by_the_first_rank_alone():
    waited = []
    for rank, expected in ((0, UserError), (1, SystemExit)):
        place = LaunchEnvironment("torchrun", rank, 2, rank, 2, "localhost", 1)
        with pytest.raises(expected) as end, one_message(place, waited.append):
            raise UserError("a mistake")
        if rank:
            assert end.value.code == 2 and len(waited) == 1  # the first rank is first to end
    with pytest.raises(LaunchError), one_message(place, waited.append):
        raise LaunchError("about this rank")
