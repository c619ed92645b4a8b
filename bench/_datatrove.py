"""Build a data set with datatrove, in a Python that has it: the peer of `fastgpt bench data`.

    python _datatrove.py FOLDER TOKENIZER_JSON

Reads FOLDER/in/*.jsonl; repairs damaged characters, applies the rules of Gopher, C4 and FineWeb, removes
near-duplicates (14 bands of 8 hashes) and personal data, writes tokens. Language is not filtered, because datatrove's
model for it is a download.
"""

import sys
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.formatters import FTFYFormatter, PIIFormatter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
from datatrove.pipeline.writers import JsonlWriter


def main(folder: str, tokenizer: str) -> None:
    """Run the four stages, one task each."""
    work = Path(folder)
    config = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)
    path = {name: str(work / name) for name in ("in", "clean", "signatures", "buckets", "remove", "logs", "tokens")}

    def run(name: str, pipeline: list[Any], tasks: int = 1) -> None:
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=1, logging_dir=f"{path['logs']}/{name}").run()

    rules = [
        FTFYFormatter(),
        GopherRepetitionFilter(),
        GopherQualityFilter(),
        C4QualityFilter(filter_no_terminal_punct=False),
        FineWebQualityFilter(),
    ]
    run("clean", [JsonlReader(path["in"]), *rules, JsonlWriter(path["clean"], compression=None)])
    run("signatures", [JsonlReader(path["clean"]), MinhashDedupSignature(path["signatures"], config=config)])
    run("buckets", [MinhashDedupBuckets(path["signatures"], path["buckets"], config=config)], tasks=14)
    run("cluster", [MinhashDedupCluster(path["buckets"], path["remove"], config=config)])
    tokens = DocumentTokenizer(path["tokens"], tokenizer, eos_token="<|endoftext|>", shuffle_documents=False)
    run("tokens", [JsonlReader(path["clean"]), MinhashDedupFilter(path["remove"]), PIIFormatter(), tokens])


if __name__ == "__main__":
    main(*sys.argv[1:])
