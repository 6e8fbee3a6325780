"""How large an index is, how fast it opens, and what each precision costs in ranking.

The memory of opening is the process's own; pages of the memory-mapped files are the system's (Linux).

python benchmarks/index_size.py --data_dir MELBENCH --entities 20000
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import torch
from bench_data import built_index, machine, mention_features, parser, trained_model

OPEN = """
import re, sys, time
from pathlib import Path
from mimic_el import EntityIndex
own = lambda: int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) / 1024
before = own()
start = time.perf_counter()
index = EntityIndex.from_pretrained(sys.argv[1])
print(time.perf_counter() - start, own() - before)
"""


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--entities", type=int, default=20_000)
    arguments.add_argument("--mentions", type=int, default=512)
    args = arguments.parse_args()
    model, processor, world = trained_model(args)
    mentions, answers = mention_features(model, processor, world, args.mentions)
    # Of the test mentions, those whose entity is in the knowledge base.
    index = built_index(args, args.entities, "float32")
    rows = [row for row, answer in enumerate(answers) if answer in index]
    mentions, known = mentions[torch.tensor(rows)], [answers[row] for row in rows]
    print(f"{machine()}; {args.entities:,} entities, {len(rows)} mentions\n")
    print(
        "| stored as | bytes of features per entity | opens in, ms | memory of opening, MB | same top 1 | same rank | "
        "MRR |\n" + "|---" * 7 + "|"
    )
    reference = None
    for dtype in ("float32", "float16", "int8"):
        index = built_index(args, args.entities, dtype)
        found = [ids[0] for ids in index.search(mentions, 1).entity_ids]
        ranks = index.rank(mentions, known).ranks
        if reference is None:
            reference = (found, ranks)
        same = np.mean([one == other for one, other in zip(found, reference[0], strict=True)])
        command = [sys.executable, "-c", OPEN, str(index.directory)]
        opened = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
        print(
            f"| {dtype} | {index.bytes_per_entity:,.0f} | {float(opened[0]) * 1e3:.0f} | {float(opened[1]):.1f} | "
            f"{same:.1%} | {np.mean(ranks == reference[1]):.1%} | {np.mean(1 / ranks):.4f} |"
        )


if __name__ == "__main__":
    main()
