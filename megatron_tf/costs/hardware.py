"""GPUs and their nodes, as the makers specify them, and the share of those numbers that real programs are assumed to
reach.

Sources: NVIDIA's datasheets of the A100, H100, H200, L40S and RTX 4090, and of the DGX A100, DGX H100, DGX H200 and
DGX B200 (memory, bandwidth, NVLink, network adapters, largest power). NVLink is counted per direction, half of what
the datasheets give. Cards without NVLink communicate over 16 lanes of PCIe 4.0, in nodes with one network adapter of
25 Gb/s for each card.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_tf.config.sections.training import ComputeType
from megatron_tf.config.topology import GridAxis, Topology
from megatron_tf.errors import ConfigError
from megatron_tf.telemetry.meters import peak_bf16_flops

GB = 1e9


@dataclass(frozen=True)
class Gpu:
    """One GPU and its share of a node. Bandwidths are in bytes/s, those of links per direction."""

    name: str
    device_name: str  # as CUDA reports it; the key in the table of peaks
    memory_bytes: float
    fp32_flops: float  # peak without tensor cores
    memory_bandwidth: float
    node_bandwidth: float  # to the other GPUs of the node
    network_bandwidth: float  # its share of the node's network adapters
    watts: float  # its share of the node's largest power, without cooling
    per_node: int = 8
    fp8: bool = True  # whether it can multiply in fp8

    def peak_flops(self, precision: ComputeType) -> float:
        """Dense peak in FLOP/s."""
        if precision == "fp32":
            return self.fp32_flops
        peak = peak_bf16_flops(self.device_name)
        assert peak is not None
        return peak


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40gb", "NVIDIA A100-SXM4-40GB", 40 * GB, 19.5e12, 1555 * GB, 300 * GB, 25 * GB, 6500 / 8, fp8=False),
        Gpu("a100", "NVIDIA A100-SXM4-80GB", 80 * GB, 19.5e12, 2039 * GB, 300 * GB, 25 * GB, 6500 / 8, fp8=False),
        Gpu("h100", "NVIDIA H100 80GB HBM3", 80 * GB, 67e12, 3350 * GB, 450 * GB, 50 * GB, 10200 / 8),
        Gpu("h200", "NVIDIA H200", 141 * GB, 67e12, 4800 * GB, 450 * GB, 50 * GB, 10200 / 8),
        Gpu("b200", "NVIDIA B200", 180 * GB, 75e12, 8000 * GB, 900 * GB, 50 * GB, 14300 / 8),
        Gpu("l40s", "NVIDIA L40S", 48 * GB, 91.6e12, 864 * GB, 32 * GB, 3.125 * GB, 350 + 100),
        Gpu("rtx4090", "NVIDIA GeForce RTX 4090", 24 * GB, 82.6e12, 1008 * GB, 32 * GB, 3.125 * GB, 450 + 100),
    )
}


def find_gpu(name: str, *, per_node: int | None = None, network_gb_per_s: float | None = None) -> Gpu:
    """The GPU called `name` in `GPUS`, with another node size or network bandwidth (GB/s for each GPU) if given.

    ConfigError for an unknown name.
    """
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise ConfigError(f"--gpu: {name!r} is not known. Choose among {', '.join(GPUS)}.")
    if per_node is not None:
        gpu = replace(gpu, per_node=per_node)
    if network_gb_per_s is not None:
        gpu = replace(gpu, network_bandwidth=network_gb_per_s * GB)
    return gpu


@dataclass(frozen=True)
class Assumptions:
    """The share of the peaks that real programs reach. Every estimate of time depends on these numbers."""

    gemm: float = 0.70  # of the peak, in large matrix products
    # Of `gemm`, in products in which a position is multiplied by the candidate that it chose, of 256 tokens. What these
    # wait for is in it as well: the order of the pairs, and small kernels. From docs/performance.md, "A layer with
    # candidates on a GPU", H100, bf16: with it, what a layer takes in addition to the dense one agrees at 0.32 to 0.44
    # (four rows), and a step of 124M with 16 candidates at 0.32 and 0.38. The six products alone reach 0.61.
    grouped: float = 0.40
    attention: float = 0.35  # of the peak, in fused causal attention
    memory: float = 0.85  # of the memory bandwidth, in elementwise kernels
    link: float = 0.75  # of a link's bandwidth, in large messages
    node_latency: float = 20e-6  # seconds a collective within a node, whatever its size
    network_latency: float = 40e-6  # and between nodes
    launch: float = 5e-6  # seconds the CPU needs to start a kernel
    reserved_bytes: float = 2 * GB  # CUDA context, NCCL's and cuBLAS's buffers
    usable_memory: float = 0.92  # of the memory that is not reserved; the rest is lost to fragmentation

    def fits(self, num_bytes: float, gpu: Gpu) -> bool:
        """Whether tensors of `num_bytes` in all fit on a rank."""
        return num_bytes <= self.usable_memory * (gpu.memory_bytes - self.reserved_bytes)

    def sentences(self) -> tuple[str, ...]:
        """For the reader of a plan."""
        return (
            f"matrix products reach {self.gemm:.0%} of the GPU's dense peak, those of candidates "
            f"{self.grouped * self.gemm:.0%}, attention {self.attention:.0%}, elementwise kernels {self.memory:.0%} of "
            f"the memory bandwidth, large messages {self.link:.0%} of the links",
            f"a collective takes {self.node_latency * 1e6:.0f} µs within a node and {self.network_latency * 1e6:.0f} "
            f"µs between nodes in addition to its transfer; a kernel {self.launch * 1e6:.0f} µs to start",
            "communication does not overlap with computation, but for the second half of a long input's norms (over "
            "tensor ranks a product really hides a part of each input's gradient as well); the data loader, "
            "evaluation and logging cost nothing",
            f"of a GPU's memory {self.reserved_bytes / GB:.0f} GB are reserved and {self.usable_memory:.0%} of the "
            "rest can be used",
            "tensor-parallel ranks are neighbours on a node, and every GPU has its share of the node's network",
        )


def group_bandwidth(gpu: Gpu, topology: Topology, axis: GridAxis) -> tuple[float, bool]:
    """(bytes/s per direction, whether it leaves the node) of a collective over `axis`.

    A group with g ranks on each node uses g network adapters at once, because each GPU of a node is in one group only.
    """
    size, stride = getattr(topology, axis), topology.stride(axis)
    on_node = max(1, min(size, gpu.per_node // stride))
    if on_node == size and size * stride <= max(gpu.per_node, stride):
        return gpu.node_bandwidth, False
    return min(gpu.node_bandwidth, on_node * gpu.network_bandwidth), True
