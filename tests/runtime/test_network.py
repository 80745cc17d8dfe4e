"""Interfaces that are here, and what the variables of gloo and NCCL make of them."""

from __future__ import annotations

import sys

import pytest

from megatron_tf.runtime import network
from megatron_tf.runtime.network import interface_problems, interfaces, stay_on_this_machine

HERE = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.0.0.1"], "eth1": ["10.1.0.1"], "ib0": []}


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setattr(network, "interfaces", lambda: HERE)
    monkeypatch.setattr(network, "_address_of_host_name", lambda: ["10.0.0.1"])


def problems(environ, hosts=("n1", "n1"), on_gpu=False):
    return list(interface_problems(environ, hosts, on_gpu))


@pytest.mark.skipif(sys.platform != "linux", reason="interfaces are looked up as Linux has them")
def test_this_machine_has_a_loopback():
    assert "127.0.0.1" in interfaces()["lo"]


@pytest.mark.parametrize("name", ["", "x", "lo", "eth0", "eth1,lo"])
def test_interfaces_that_gloo_finds(machine, name):
    """It takes no notice of a single character."""
    assert problems({"GLOO_SOCKET_IFNAME": name}) == problems({}) == []


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("ib1", "ib1 is no interface of this machine, which has lo, eth0, eth1."),
        ("eth0,ib1", "GLOO_SOCKET_IFNAME=eth0,ib1: ib1 is no interface"),
        (" lo", " lo is no interface"),
        ("ib0", "ib0 is an interface without an address of this machine"),
    ],
)
def test_interfaces_that_gloo_does_not_find(machine, value, words):
    (sentence,) = problems({"GLOO_SOCKET_IFNAME": value})
    assert words in sentence and sentence.endswith("Set it to one of them, or unset it.")


def test_a_loopback_between_machines(machine, monkeypatch):
    (sentence,) = problems({"GLOO_SOCKET_IFNAME": "lo"}, ["n1", "n2"])
    assert "GLOO_SOCKET_IFNAME=lo: an address that other machines cannot reach" in sentence
    assert "on 2 machines" in sentence and sentence.endswith("here are eth0, eth1.")
    assert problems({}, ["n1", "n2"]) == []
    monkeypatch.setattr(network, "_address_of_host_name", lambda: ["127.0.1.1"])
    (sentence,) = problems({}, ["n1", "n2"])
    assert "this machine's name" in sentence and "is 127.0.1.1" in sentence
    assert problems({}) == problems({"GLOO_SOCKET_IFNAME": "eth0"}, ["n1", "n2"]) == []


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("eth", True),
        ("ib", False),
        ("=eth", False),
        ("=eth0", True),
        ("eth9,lo", True),
        ("^lo", True),
        ("^lo,eth", False),
    ],
)
def test_interfaces_of_nccl(machine, value, found):
    sentences = problems({"NCCL_SOCKET_IFNAME": value}, on_gpu=True)
    assert (sentences == []) == found
    assert found or sentences[0].startswith(f"NCCL_SOCKET_IFNAME={value}: no interface of this machine is meant by it")
    assert problems({"NCCL_SOCKET_IFNAME": value}) == []


def test_ranks_of_one_machine_stay_on_it(monkeypatch):
    environ = {"GLOO_SOCKET_IFNAME": "ib7", "NCCL_SOCKET_IFNAME": "ib7", "OTHER": "1"}
    monkeypatch.setattr(network, "interfaces", lambda: HERE)
    stay_on_this_machine(environ)
    assert environ == {"GLOO_SOCKET_IFNAME": network.LOOPBACK, "OTHER": "1"}
    monkeypatch.setattr(network, "interfaces", dict)
    stay_on_this_machine(environ)
    assert environ == {"OTHER": "1"}
