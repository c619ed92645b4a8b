"""Which of PyTorch's fused attentions comes first: cuDNN where it is fastest, by capability and version."""

from __future__ import annotations

import pytest
import torch

from fastgpt.core import backend
from fastgpt.core.device import library_attention


@pytest.mark.parametrize(
    "capability, cudnn, first",
    [
        ((9, 0), 91900, "cuDNN first"),
        ((10, 0), 91501, "cuDNN first"),
        ((10, 3), 92700, "cuDNN first"),
        ((9, 0), 91500, "flash first: cuDNN is 9.15.0, PyTorch prefers 9.15.1 and newer"),
        ((10, 0), 90100, "flash first: cuDNN is 9.1.0, PyTorch prefers 9.15.1 and newer"),
        ((9, 0), None, "flash first: cuDNN is 0.0.0, PyTorch prefers 9.15.1 and newer"),
        ((12, 0), 92700, "flash first"),
        ((8, 0), 92700, "flash first"),
    ],
)
def test_cudnn_comes_first_where_pytorch_says_so(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], cudnn: int | None, first: str
) -> None:
    """And `doctor` says which it is, for the GPUs on which the library's attention is the prior."""
    monkeypatch.delenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    monkeypatch.setattr(backend, "refusal", lambda *args: None)
    monkeypatch.setattr(backend, "tuned", lambda *args: None)
    assert library_attention() == first
    picked, why = backend.explain("attention", "cuda", torch.bfloat16)
    name = "sm_{}{}".format(*capability)
    expected = f"prior: the library's attention on {name} ({first}), until `fastgpt tune`"
    assert (picked == "torch" and why.startswith(expected)) if capability >= (9, 0) else picked == "triton"


def test_what_turns_cudnn_off_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
    assert library_attention() == "flash first: cuDNN's attention is turned off"
    monkeypatch.setenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
    assert "TORCH_CUDNN_SDPA_DEPRIORITIZED=1" in library_attention()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="asks PyTorch what it would launch on this GPU")
def test_pytorch_chooses_what_is_told() -> None:
    from torch.nn.attention import SDPBackend

    q = torch.empty(2, 4, 256, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    chosen = SDPBackend(torch._fused_sdp_choice(q, q, q, is_causal=True))
    cudnn = library_attention() == "cuDNN first"
    assert chosen == (SDPBackend.CUDNN_ATTENTION if cudnn else SDPBackend.FLASH_ATTENTION)
