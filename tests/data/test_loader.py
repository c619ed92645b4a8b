import gc
import random
import threading
import time

import numpy as np
import pytest
import torch

from fastgpt.core.errors import UserError
from fastgpt.data import IGNORE, TokenLoader, Tokens, sequential
from fastgpt.data.loader import permute

N, T = 5003, 16
IDS = np.arange(N, dtype=np.uint16)  # each token is its own position


def take(loader: TokenLoader, n: int) -> list[torch.Tensor]:
    return [torch.stack(next(loader)) for _ in range(n)]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 65, 1000])
def test_permute_is_a_permutation_that_the_key_selects(n: int):
    index = np.arange(n)
    orders = [permute(index, n, key) for key in range(5)]
    assert all(np.array_equal(np.sort(o), index) for o in orders)
    if n >= 64:
        assert len({o.tobytes() for o in orders}) == 5
        assert np.array_equal(permute(index[5:9], n, 3), orders[3][5:9])


def test_permute_spreads_evenly():
    at = np.array([permute(np.arange(10), 10, key) for key in range(2000)])
    counts = np.array([np.bincount(at[:, i], minlength=10) for i in range(10)])
    assert np.abs(counts - 200).max() < 75  # 5.6 standard deviations of a fair count
    steps = np.diff(permute(np.arange(100_000), 100_000, 1))
    assert abs(np.corrcoef(steps[:-1], steps[1:])[0, 1] + 0.5) < 0.02  # as of independent draws


def test_the_order_never_changes():
    # pinned: a checkpoint's cursor means these windows, in every later version
    assert permute(np.arange(8), 8, 42).tolist() == [1, 0, 5, 6, 7, 4, 3, 2]
    assert TokenLoader(IDS, 4, T, seed=7).starts(0, 4) == [4750, 1710, 4350, 1166]


def test_batches_are_next_token_pairs():
    x, y = next(TokenLoader(IDS, 5, T, seed=1))
    assert x.shape == y.shape == (5, T) and x.dtype == y.dtype == torch.int64
    assert torch.equal(x + 1, y) and torch.equal(x, x[:, :1] + torch.arange(T))
    assert x.is_contiguous() and y.is_contiguous()


@pytest.mark.parametrize(("batch", "world"), [(1, 1), (7, 1), (4, 3), (500, 1)])
def test_an_epoch_visits_every_window_once_over_all_ranks(batch: int, world: int):
    loaders = [TokenLoader(IDS, batch, T, seed=3, rank=r, world=world) for r in range(world)]
    windows = loaders[0].windows
    assert windows == (N - T) // T
    firsts: list[int] = []
    while len(firsts) < 3 * windows:
        for loader in loaders:
            firsts += next(loader)[0][:, 0].tolist()
    offsets = []
    for epoch in range(3):
        mine = sorted(firsts[epoch * windows : (epoch + 1) * windows])
        offsets.append(mine[0])
        assert mine == list(range(mine[0], mine[0] + windows * T, T))
    assert len(set(offsets)) == 3
    assert firsts[:windows] != sorted(firsts[:windows]) and firsts[:windows] != firsts[windows : 2 * windows]


def test_ranks_see_disjoint_windows_and_together_what_one_sees():
    one = TokenLoader(IDS, 12, T, seed=5)
    four = [TokenLoader(IDS, 3, T, seed=5, rank=r, world=4) for r in range(4)]
    for _ in range(20):
        parts = [next(loader)[0] for loader in four]
        assert torch.equal(next(one)[0], torch.cat(parts))
        assert len({int(i) for p in parts for i in p[:, 0]}) == 12


def test_seeds_differ():
    a, b, c = (take(TokenLoader(IDS, 8, T, seed=s), 3) for s in (0, 0, -1))
    assert same(a, b) and not same(a, c)


@pytest.mark.parametrize("prefetch", [0, 3])
def test_resume_is_bit_exact_at_random_points(prefetch: int):
    rng = random.Random(0)
    whole = take(TokenLoader(IDS, 7, T, seed=9), 120)  # 311 windows: past two epochs
    for _ in range(8):
        at = rng.randrange(100)
        first = TokenLoader(IDS, 7, T, seed=9, prefetch=prefetch)
        assert same(take(first, at), whole[:at])
        if prefetch:
            time.sleep(0.01)  # lets the thread run ahead of what was consumed
        state = first.state_dict()
        again = TokenLoader(IDS, 7, T, seed=9, prefetch=prefetch)
        take(again, 2)
        again.load_state_dict(state)
        assert again.state_dict() == state
        assert same(take(again, 20), whole[at : at + 20])
        assert same(take(first, 5), whole[at : at + 5])
        first.close()
        again.close()


def test_resume_with_other_batch_and_world():
    whole = take(TokenLoader(IDS, 12, T, seed=2), 10)
    first = TokenLoader(IDS, 12, T, seed=2)
    take(first, 4)
    ranks = [TokenLoader(IDS, 3, T, seed=2, rank=r, world=4) for r in range(4)]
    for loader in ranks:
        loader.load_state_dict(first.state_dict())
    for want in whole[4:]:
        assert torch.equal(torch.cat([torch.stack(next(r)) for r in ranks], 1), want)


def test_state_is_plain_and_refuses_another_run():
    state = TokenLoader(IDS, 4, T, seed=1).state_dict()
    assert state["epoch"] == state["position"] == 0 and all(type(v) in (int, str) for v in state.values())
    changed = IDS.copy()
    changed[0] = 9
    for loader, said in (
        (TokenLoader(IDS, 4, T, seed=2), "seed was 1, now it is 2"),
        (TokenLoader(IDS, 4, 8, seed=1), "block was 16, now it is 8"),
        (TokenLoader(IDS[:-1], 4, T, seed=1), "n_tokens was 5003, now it is 5002"),
        (TokenLoader(changed, 4, T, seed=1), "tokens was"),
    ):
        with pytest.raises(UserError, match=f"cannot resume the data order: {said}"):
            loader.load_state_dict(state)
    with pytest.raises(UserError, match="version was 0, now it is 1"):
        TokenLoader(IDS, 4, T, seed=1).load_state_dict({**state, "version": 0})


@pytest.mark.parametrize("n", [T + 1, T + 2, 2 * T, 2 * T + 5, 3 * T + 1])
def test_small_corpora_work_and_use_every_token(n: int):
    loader = TokenLoader(IDS[:n], 3, T)
    seen = set()
    for _ in range(200):
        x, y = next(loader)
        assert torch.equal(x + 1, y) and int(y.max()) < n
        seen |= set(x.flatten().tolist()) | set(y.flatten().tolist())
    assert seen == set(range(n))


def test_corpus_shorter_than_one_block():
    with pytest.raises(UserError, match="the corpus has 16 tokens, one block needs 16 \\+ 1"):
        TokenLoader(IDS[:T], 1, T)
    for args in ({"batch": 0, "block": 4}, {"batch": 4, "block": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            TokenLoader(IDS, **args)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        TokenLoader(IDS, 1, T, rank=2, world=2)


class Huge:
    """2^40 tokens, each its own position modulo 2^31 - 1."""

    def __len__(self) -> int:
        return 1 << 40

    def read(self, start: int, n: int) -> np.ndarray:
        assert start >= 0 and start + n <= len(self)
        return np.arange(start, start + n, dtype=np.int64)

    def fingerprint(self) -> str:
        return "huge"


def test_positions_past_32_bits():
    loader = TokenLoader(Huge(), 8, 32)
    assert loader.windows == (1 << 40) // 32 - 1
    loader.load_state_dict({**loader.state_dict(), "epoch": 3, "position": loader.windows - 4})
    x = next(loader)[0]
    assert int(x.max()) > 1 << 36 and loader.state_dict()["position"] == 4 and loader.state_dict()["epoch"] == 4
    x, _ = next(sequential(Huge(), 2, 1 << 20, rank=1, world=2, max_batches=1))
    assert x[:, 0].tolist() == [1 << 38, 3 << 38]


def test_windows_across_shards():
    tokens = Tokens(np.split(IDS, [10, 11, 700, 3000]))
    assert same(take(TokenLoader(tokens, 9, T), 40), take(TokenLoader(IDS, 9, T), 40))


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "fastgpt-loader"]


def test_prefetch_gives_the_same_batches_and_its_thread_ends():
    loader = TokenLoader(IDS, 6, T, prefetch=2)
    assert same(take(loader, 50), take(TokenLoader(IDS, 6, T), 50))
    assert threads()
    del loader
    gc.collect()
    assert not threads()


def test_an_error_in_the_thread_reaches_the_consumer():
    class Failing(Tokens):
        fail = False

        def read(self, start: int, n: int) -> np.ndarray:
            if self.fail:
                raise OSError("disk gone")
            return super().read(start, n)

    tokens = Failing([IDS])
    loader = TokenLoader(tokens, 4, T, prefetch=1)
    tokens.fail = True
    for _ in range(2):
        with pytest.raises(OSError, match="disk gone"):
            next(loader)
    tokens.fail = False
    assert same(take(loader, 3), take(TokenLoader(IDS, 4, T), 3))
    loader.close()
    assert not threads()


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("n", [2, T, T + 1, T + 2, 20 * T, 20 * T + 1, 333])
def test_validation_counts_every_target_once(n: int, world: int):
    targets: list[int] = []
    lengths = set()
    for rank in range(world):
        batches = list(sequential(IDS[:n], 4, T, rank=rank, world=world))
        lengths.add(len(batches))
        for x, y in batches:
            assert x.shape == y.shape == (4, T)
            counted = y != IGNORE
            assert torch.equal(x[counted] + 1, y[counted]) and not x[~counted].any()
            targets += y[counted].tolist()
    assert sorted(targets) == list(range(1, n)) and len(lengths) == 1


def test_limited_validation_is_fixed_and_spread_over_the_whole():
    a, b = (list(sequential(IDS, 4, T, max_batches=5)) for _ in range(2))
    assert len(a) == 5 and all(torch.equal(p, q) for s, t in zip(a, b, strict=True) for p, q in zip(s, t, strict=True))
    firsts = torch.cat([x[:, 0] for x, _ in a]).tolist()
    assert len(set(firsts)) == 20 and firsts[0] == 0 and firsts[-1] > 0.9 * N
    with pytest.raises(UserError, match="the validation split has 1 tokens, expected at least 2"):
        sequential(IDS[:1], 4, T)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_on_a_gpu_equal_those_on_the_cpu():
    gpu = TokenLoader(IDS, 6, T, device="cuda")
    got = take(gpu, 100)
    assert all(b.is_cuda for b in got) and same([b.cpu() for b in got], take(TokenLoader(IDS, 6, T), 100))
    gpu.close()
