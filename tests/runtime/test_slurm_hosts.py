"""Where rank 0 of a SLURM step runs."""

from __future__ import annotations

import pytest

from megatron_tf.errors import LaunchError
from megatron_tf.runtime.slurm_hosts import expand_hostlist, host_of_rank_zero


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


STEP = {"SLURM_STEP_NODELIST": "n[1-3]", "SLURM_JOB_NODELIST": "n[1-9]", "SLURM_DISTRIBUTION": "cyclic"}


def test_the_first_node_of_the_step():
    assert host_of_rank_zero(STEP) == ("n1", "SLURM_STEP_NODELIST")
    assert host_of_rank_zero({"SLURM_JOB_NODELIST": "n[4-9]"}) == ("n4", "SLURM_JOB_NODELIST")
    # of an outer script, and not how this step was distributed
    assert host_of_rank_zero({**STEP, "SLURM_HOSTFILE": "/nowhere"})[0] == "n1"
    with pytest.raises(LaunchError, match="Neither MASTER_ADDR nor SLURM_STEP_NODELIST"):
        host_of_rank_zero({})


@pytest.mark.parametrize(
    ("nodes", "host"), [("n[1-3]", "n3"), ("n[1-2]", "n2"), ("n1", "n1"), ("n[1-2,4]", "n2"), ("n[7-8]", "n7")]
)
def test_components_of_a_heterogeneous_job(nodes, host):
    """As SLURM 22.05 sets them: of all components, although a step (--het-group=1,2) may leave out some."""
    groups = {f"SLURM_JOB_NODELIST_HET_GROUP_{number}": text for number, text in enumerate(("n3", "n[2,4]", "n1"))}
    if "4" not in nodes:
        groups["SLURM_JOB_NODELIST_HET_GROUP_1"] = "n2"
    assert host_of_rank_zero({**STEP, "SLURM_STEP_NODELIST": nodes, "SLURM_HET_SIZE": "3", **groups})[0] == host


@pytest.mark.parametrize("text", ["n2\nn1\nn3\n", "# by hand\n\n n2*2\nn1\n", "n2,n1", "n[2-3]\n"])
def test_a_host_file(tmp_path, text):
    path = tmp_path / "hosts"
    path.write_text(text)
    arbitrary = {**STEP, "SLURM_DISTRIBUTION": "arbitrary", "SLURM_HOSTFILE": str(path)}
    assert host_of_rank_zero(arbitrary) == ("n2", "SLURM_HOSTFILE")


def test_what_slurm_does_not_say(tmp_path):
    arbitrary = {**STEP, "SLURM_DISTRIBUTION": "arbitrary"}
    with pytest.raises(LaunchError, match="without SLURM_HOSTFILE nothing says on which.*Set MASTER_ADDR"):
        host_of_rank_zero(arbitrary)
    with pytest.raises(LaunchError, match="SLURM_HOSTFILE=/no/hosts .*cannot be read on this one: No such file"):
        host_of_rank_zero({**arbitrary, "SLURM_HOSTFILE": "/no/hosts"})
    (tmp_path / "empty").write_text("# none\n")
    with pytest.raises(LaunchError, match="names no host"):
        host_of_rank_zero({**arbitrary, "SLURM_HOSTFILE": str(tmp_path / "empty")})
    assert host_of_rank_zero({**arbitrary, "SLURM_STEP_NODELIST": "n5"})[0] == "n5"
