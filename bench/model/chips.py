"""Published rates of A100 SXM, H100 SXM and H200 SXM.

Sources, by the names that the comments use:
  guide        CUDA C++ best practices guide 13.0, "Throughput of Native Arithmetic Instructions" (results per cycle and
               multiprocessor, columns 8.0 and 9.0; in the programming guide before 13)
  A100, H100   NVIDIA's white papers "A100 Tensor Core GPU Architecture" 1.0 and "H100 Tensor Core GPU Architecture"
               1.04. Their peak rates give the guide's again: FP16 78 and 133.8 TFLOP/s, BF16 39 and 133.8, FP32 19.5
               and 66.9, FP64 9.7 and 33.5, each over 2 x multiprocessors x clock (H100: 1.98 GHz for these)
  data sheets  NVIDIA's data sheets of A100 80GB SXM, H100 SXM and H200 SXM
  Luo          Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture", arXiv 2402.13499: tables IV
               and V, and section 6.2; measured on an A100 PCIe and an H800 PCIe
  Sun          Sun et al., "Dissecting Tensor Cores via Microbenchmarks", arXiv 2206.02874

Without a published source, or not looked up: `l2` of the H100 and H200 (NVIDIA states none; Luo, table V, measured 4472
bytes per cycle on an H800 PCIe), the latencies of the H200 (taken to be the H100's), `mma_share` of the A100 (Sun,
quoted from memory), and which pipe executes an opcode (opcodes.py). The first device corrects them.
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
    shared_bytes: int = 128  # per cycle and multiprocessor: 32 banks of 4 bytes (CUDA programming guide, shared memory)

    @property
    def bytes_to_cover(self) -> float:
        """Bytes that a multiprocessor must have in flight to keep the memory busy (Little's law)."""
        return self.dram / self.multiprocessors * self.dram_latency / self.clock


A100 = Chip(
    name="A100",
    capability=80,
    multiprocessors=108,  # A100, table 4, also the next one
    clock=1.41e9,
    dram=2.039e12,  # data sheets
    l2=5120,  # A100, "A100 L2 Cache": reads
    tensor_fma=1024,  # A100, "A100 SM Architecture": 256 for each of four tensor cores
    mma_share=1.0,  # Sun: m16n8k16 reaches the peak
    fp32_lanes=64,  # guide, also the next six
    fp16_lanes=128,
    bf16_lanes=64,
    fp64_lanes=32,
    multiply_lanes=64,
    integer_lanes=64,
    mufu_lanes=16,
    l2_latency=262,  # Luo, table IV, also the next two
    dram_latency=466,
    shared_latency=29,
)
H100 = Chip(
    name="H100",
    capability=90,
    multiprocessors=132,  # H100, table 3
    clock=1.83e9,  # H100, table 3: with tensor cores in 16 bits (989.4 TFLOP/s); other kernels may run at 1.98e9
    dram=3.352e12,  # H100, table 3; data sheets: 3.35e12
    l2=5120,  # assumed: as on A100
    tensor_fma=2048,  # H100, "H100 SM Architecture": twice the A100's, 512 for each of four tensor cores
    mma_share=0.629,  # Luo, section 6.2: mean of mma.sync's shapes over the peak
    fp32_lanes=128,  # guide, also the next six
    fp16_lanes=128,
    bf16_lanes=128,
    fp64_lanes=64,
    multiply_lanes=64,
    integer_lanes=64,
    mufu_lanes=16,
    l2_latency=263,  # Luo, table IV, also the next two; of an idle memory, so that the bound stays a lower one
    dram_latency=479,
    shared_latency=29,
)
H200 = dataclasses.replace(H100, name="H200", dram=4.8e12)  # data sheets, also the multiprocessors; the rest as on H100
CHIPS = {chip.name: chip for chip in (A100, H100, H200)}
