"""The plan and the log of tests/numeric_cover.py; its runs are for `make test-all`."""

import itertools

import numeric_cover
import pytest


@pytest.mark.parametrize("flags", ["", "sse2", "sse2 avx2 fma", "sse2 avx2 fma avx512f avx512bw avx512dq avx512vl"])
def test_every_pair_of_settings_meets_in_few_runs(flags: str) -> None:
    values = numeric_cover.factors(set(flags.split()))
    runs = numeric_cover.cover(values)
    assert len(runs) <= numeric_cover.MOST_RUNS
    for (a, of_a), (b, of_b) in itertools.combinations(values.items(), 2):
        assert {(r[a], r[b]) for r in runs} == set(itertools.product(of_a, of_b))


def test_the_log_names_what_failed() -> None:
    setting = {"MKL_CBWR": "", "SEED": "1"}
    right = numeric_cover.Result(setting, 7, [], 0.5, 1.0)
    wrong = numeric_cover.Result({**setting, "MKL_CBWR": "COMPATIBLE"}, 6, ["test_parity[rope]"], 1.25, 1.0)
    page = numeric_cover.log([right, wrong], 12, 4)
    assert "2 of 12 runs" in page and "| not set | 1 | 7 | 0 | 0.500 |" in page
    assert "| COMPATIBLE | 1 | 6 | 1 | 1.250 |" in page and page.endswith("- test_parity[rope]\n")
