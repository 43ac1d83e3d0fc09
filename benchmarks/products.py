"""Where a product in bf16 leaves a core idle, and what half the columns at a time gain there (`ppo_plus/products.py`).

    python benchmarks/products.py [--summed 576 1536] [--columns 384 576 768 1024] [--rows 256 512 976 1536]

For each shape, TFLOP/s of the whole product and of its halves; `*` where ppo_plus takes the halves. The best of
--repeats rounds over all shapes, both kinds in turn: a machine whose two cores are one at times shows what two give.
The last line is JSON; without AMX no halves are taken, and no result is written.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time

import torch
from measuring import report

from ppo_plus import products

Shape = tuple[int, int, int]  # rows, summed, columns


def seconds(shape: Shape, halves: bool) -> float:
    """Of one product with operands of its own, after one that is not counted."""
    rows, summed, columns = shape
    x, weight = torch.randn(rows, summed).bfloat16(), torch.randn(columns, summed).bfloat16().t()
    rule, products.in_halves = products.in_halves, lambda x, columns: halves
    products.product(x, weight)
    started = time.perf_counter()
    products.product(x, weight)
    spent = time.perf_counter() - started
    products.in_halves = rule
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--summed", type=int, nargs="+", default=[576, 1536])
    parser.add_argument("--columns", type=int, nargs="+", default=[384, 576, 768, 1024])
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 512, 768, 976, 1152, 1536, 2048])
    parser.add_argument("--repeats", type=int, default=40)
    args = parser.parse_args()
    shapes = [(r, k, n) for k, n, r in itertools.product(args.summed, args.columns, args.rows)]
    best = {(shape, halves): float("inf") for shape in shapes for halves in (False, True)}
    for _ in range(args.repeats):
        for key in best:
            best[key] = min(best[key], seconds(*key))
    table, gains = [], []
    for rows, summed, columns in shapes:
        work = 2e-12 * rows * summed * columns
        whole, halves = (work / best[(rows, summed, columns), kind] for kind in (False, True))
        taken = products.in_halves(torch.empty(rows, summed, dtype=torch.bfloat16), columns)
        gains += [halves / whole] if taken else []
        table.append({"rows": rows, "summed": summed, "columns": columns, "taken_in_halves": taken,
                      "whole_tflops": whole, "halves_tflops": halves})  # fmt: skip
        print(f"({rows}, {summed}) x ({summed}, {columns}): {whole:.2f} whole, {halves:.2f} in halves"
              f"{' *' if taken else ''}", flush=True)  # fmt: skip
    result = {"threads": torch.get_num_threads(), "table": table}
    if gains:
        result |= {"least_gain": min(gains), "median_gain": statistics.median(gains)}
    report("products", result, write=bool(gains))


if __name__ == "__main__":
    main()
