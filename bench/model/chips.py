"""Published rates of A100 SXM, H100 SXM and H200 SXM.

Sources, by the names that the comments use:
  guide        CUDA C++ programming guide 13: "Throughput of Native Arithmetic Instructions" (results per cycle and
               multiprocessor) and "Technical Specifications per Compute Capability"
  A100, H100   NVIDIA's white papers "A100 Tensor Core GPU Architecture" and "H100 Tensor Core GPU Architecture"
  data sheets  NVIDIA's data sheets of A100 80GB SXM, H100 SXM and H200 SXM
  Luo          Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture", arXiv 2402.13499
  Sun          Sun et al., "Dissecting Tensor Cores via Microbenchmarks", arXiv 2206.02874

Latencies and mma_share are quoted from memory: the papers were not at hand. The first device corrects them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

QUARTERS = 4  # schedulers of a multiprocessor, each with its own pipes (A100, H100)
WARP = 32


@dataclass(frozen=True)
class Chip:
    """Rates of one GPU. Lanes are results per cycle and multiprocessor; latencies are cycles."""

    name: str
    capability: int  # as in 80; what occupancy depends on is in fastgpt.bench.codegen.CHIPS
    multiprocessors: int
    clock: float  # Hz, the boost clock that the peak rates are stated at
    dram: float  # bytes/s
    l2: float  # bytes per cycle, all slices
    tensor_fma: int  # dense 16-bit multiply-adds per cycle and multiprocessor
    mma_share: float  # share of that rate which mma.sync reaches; wgmma reaches all of it
    fp32_lanes: int
    fp16_lanes: int  # of pairs: HFMA2
    bf16_lanes: int  # of pairs
    fp64_lanes: int
    multiply_lanes: int  # 32-bit integer multiply-add
    integer_lanes: int
    mufu_lanes: int
    l2_latency: int
    dram_latency: int
    shared_latency: int
    shared_bytes: int = 128  # per cycle and multiprocessor: 32 banks of 4 bytes (guide, shared memory)

    @property
    def bytes_to_cover(self) -> float:
        """Bytes that a multiprocessor must have in flight to keep the memory busy (Little's law)."""
        return self.dram / self.multiprocessors * self.dram_latency / self.clock


A100 = Chip(
    name="A100",
    capability=80,
    multiprocessors=108,  # data sheets
    clock=1.41e9,  # data sheets
    dram=2.039e12,  # data sheets
    l2=5120,  # A100
    tensor_fma=1024,  # A100: 256 for each of four tensor cores
    mma_share=1.0,  # Sun: m16n8k16 reaches the peak
    fp32_lanes=64,  # guide, also the next six
    fp16_lanes=128,
    bf16_lanes=64,
    fp64_lanes=32,
    multiply_lanes=64,
    integer_lanes=64,
    mufu_lanes=16,
    l2_latency=262,  # Luo, also the next two
    dram_latency=466,
    shared_latency=29,
)
H100 = Chip(
    name="H100",
    capability=90,
    multiprocessors=132,  # data sheets
    clock=1.83e9,  # 989.4 TFLOP/s (data sheets) over 132 x 2048 multiply-adds; light kernels may run at 1.98e9
    dram=3.352e12,  # data sheets
    l2=5120,  # H100: as on A100
    tensor_fma=2048,  # H100: 512 for each of four tensor cores
    mma_share=0.629,  # Luo: mean of mma.sync's shapes over the peak
    fp32_lanes=128,  # guide, also the next six
    fp16_lanes=128,
    bf16_lanes=128,
    fp64_lanes=64,
    multiply_lanes=64,
    integer_lanes=64,
    mufu_lanes=16,
    l2_latency=263,  # Luo, also the next two; of an idle memory, so that the bound stays a lower one
    dram_latency=479,
    shared_latency=29,
)
H200 = dataclasses.replace(H100, name="H200", dram=4.8e12)  # data sheets; the H100's multiprocessors and latencies
CHIPS = {chip.name: chip for chip in (A100, H100, H200)}
