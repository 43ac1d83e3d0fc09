"""Where a product in bf16 leaves a core idle, and what half the columns at a time gain there (`ppo_plus/products.py`).

    python benchmarks/products.py [--summed 576 1536] [--columns 384 576 768 1024] [--rows 256 512 976 1536]

For each shape, TFLOP/s of the whole product and of its halves, best of --repeats taken in turn; `*` where ppo_plus
takes the halves. On a machine whose two cores are at times one, run it again. The last line is JSON.
"""

from __future__ import annotations

import argparse
import time

import torch
from measuring import report

from ppo_plus import products


def rates(rows: int, summed: int, columns: int, repeats: int) -> dict[bool, float]:
    """TFLOP/s by whether the product is taken in halves."""
    x = torch.randn(rows, summed, dtype=torch.bfloat16)
    weight = torch.randn(columns, summed, dtype=torch.bfloat16).t()
    best, rule = {False: float("inf"), True: float("inf")}, products.in_halves
    for _ in range(repeats):
        for halves in best:
            products.in_halves = lambda x, columns, halves=halves: halves
            started = time.perf_counter()
            products.product(x, weight)
            best[halves] = min(best[halves], time.perf_counter() - started)
    products.in_halves = rule
    return {halves: 2e-12 * rows * summed * columns / seconds for halves, seconds in best.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--summed", type=int, nargs="+", default=[576, 1536])
    parser.add_argument("--columns", type=int, nargs="+", default=[384, 576, 768, 1024])
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 512, 768, 976, 1152, 1536, 2048])
    parser.add_argument("--repeats", type=int, default=40)
    args = parser.parse_args()
    table = []
    for summed in args.summed:
        for columns in args.columns:
            for rows in args.rows:
                found = rates(rows, summed, columns, args.repeats)
                taken = products.in_halves(torch.empty(rows, summed, dtype=torch.bfloat16), columns)
                table.append({"rows": rows, "summed": summed, "columns": columns, "taken_in_halves": taken,
                              "whole_tflops": found[False], "halves_tflops": found[True]})  # fmt: skip
                print(f"({rows}, {summed}) x ({summed}, {columns}): {found[False]:.2f} whole, {found[True]:.2f} in "
                      f"halves {'*' if taken else ''}", flush=True)  # fmt: skip
    taken = [row for row in table if row["taken_in_halves"]]
    gains = sorted(row["halves_tflops"] / row["whole_tflops"] for row in taken)
    result = {"threads": torch.get_num_threads(), "table": table}
    if gains:
        result |= {"least_gain": gains[0], "median_gain": gains[len(gains) // 2]}
    report("products", result)


if __name__ == "__main__":
    main()
