"""Time the fused mean against torch's own ways and against the machine's streaming limit, in one run.

    python benchmarks/kernel.py                       # every set, 2, 4 and 8 towers, float32 and bfloat16
    python benchmarks/kernel.py --sets resnet50 --towers 4 --dtypes float32
    python benchmarks/kernel.py --device cuda         # GB/s as a share of a device-to-device copy

Rivals run in turn, round after round, so that a machine that slows down slows all of them; each figure is the
median of its rounds. Prints a table and writes kernel.json and kernel.png to --out.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from parameter_sets import PARAMETER_SETS
from streaming import cpu_streaming_limit, device_copy_limit

from torchtower import build_info, ops

Run = Callable[[], object]


def rivals(shapes: list[tuple[int, ...]], num_towers: int, dtype: torch.dtype, device: torch.device) -> dict[str, Run]:
    """Each callable averages the same gradients once; those in place overwrite tower 0's, as ours does."""
    towers = [[torch.randn(s, device=device).to(dtype) for s in shapes] for _ in range(num_towers)]
    grads = [grad for tower in towers for grad in tower]
    fresh = [torch.empty_like(grad) for grad in towers[0]]
    by_parameter = list(zip(*towers, strict=True))
    numel = sum(grad.numel() for grad in towers[0])
    flat = [torch.randn(numel, device=device).to(dtype) for _ in towers]
    weights = [1.0 / num_towers] * num_towers
    bytes_each = numel * dtype.itemsize // 64 * 64

    def foreach_in_place() -> None:
        for tower in towers[1:]:
            torch._foreach_add_(towers[0], tower)
        torch._foreach_div_(towers[0], num_towers)

    def foreach_new() -> Any:
        total = torch._foreach_add(towers[0], towers[1])
        for tower in towers[2:]:
            torch._foreach_add_(total, tower)
        torch._foreach_div_(total, num_towers)
        return total

    def flat_in_place() -> None:
        for tower in flat[1:]:
            flat[0].add_(tower)
        flat[0].div_(num_towers)

    limit = (
        cpu_streaming_limit(bytes_each, num_towers)
        if device.type == "cpu"
        else device_copy_limit(bytes_each, num_towers, device)
    )
    return {
        "limit": limit,
        "ours, in place": lambda: ops.tower_mean_(towers[0], grads, weights),
        "ours, other outputs": lambda: ops.tower_mean_(fresh, grads, weights),
        "ours, with statistics": lambda: ops.tower_mean_with_statistics_(towers[0], grads, weights),
        "foreach, in place": foreach_in_place,
        "flat, in place": flat_in_place,
        "foreach, new": foreach_new,
        "stack().mean(0)": lambda: [torch.stack(one).mean(0) for one in by_parameter],
    }


def measure(runs: dict[str, Run], device: torch.device, seconds: float) -> dict[str, float]:
    """Median milliseconds of each, from at least 5 interleaved rounds after one that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 6 or (time.perf_counter() < end and rounds < 200):
        for name, run in runs.items():
            run()  # so that a set which fits the cache is found there, whatever the rival before has left
            _synchronize(device)
            begin = time.perf_counter()
            run()
            _synchronize(device)
            if rounds > 0:
                times[name].append(1e3 * (time.perf_counter() - begin))
        rounds += 1
    return {name: statistics.median(samples) for name, samples in times.items()}


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def case(name: str, num_towers: int, dtype: torch.dtype, device: torch.device, seconds: float) -> dict[str, Any]:
    shapes = PARAMETER_SETS[name]()
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    ms = measure(rivals(shapes, num_towers, dtype, device), device, seconds)
    ours = ms["ours, in place"]
    moved_bytes = (num_towers + 1) * numel * dtype.itemsize
    return {
        "set": name,
        "towers": num_towers,
        "dtype": str(dtype).removeprefix("torch."),
        "parameters": len(shapes),
        "numel": numel,
        "milliseconds": ms,
        "gigabytes_per_second": moved_bytes / ours * 1e-6,
        "of_limit": ms["limit"] / ours,
        "against_stack_mean": ms["stack().mean(0)"] / ours,
        "against_foreach_in_place": ms["foreach, in place"] / ours,
        # Not the same task where tensors are many: it starts from gradients that already lie in one flat tensor.
        "against_flat_in_place": ms["flat, in place"] / ours,
        "statistics_cost": ms["ours, with statistics"] / ours - 1,
        "microseconds_per_gradient": 1e3 * ours / (len(shapes) * num_towers),
    }


def print_row(row: dict[str, Any], is_first: bool) -> None:
    if is_first:
        print(
            f"{'set':<12}{'T':>3} {'dtype':<9}{'ours ms':>9}{'GB/s':>7}{'of limit':>10}{'x stack':>9}"
            f"{'x foreach':>11}{'x flat':>8}{'statistics':>12}{'us/grad':>9}"
        )
    print(
        f"{row['set']:<12}{row['towers']:>3} {row['dtype']:<9}{row['milliseconds']['ours, in place']:>9.3f}"
        f"{row['gigabytes_per_second']:>7.1f}{row['of_limit']:>10.0%}{row['against_stack_mean']:>9.1f}"
        f"{row['against_foreach_in_place']:>11.2f}{row['against_flat_in_place']:>8.2f}{row['statistics_cost']:>+12.0%}{row['microseconds_per_gradient']:>9.2f}",
        flush=True,
    )


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.55 * len(rows)), layout="constrained")
    names = list(rows[0]["milliseconds"])
    for i, name in enumerate(names):
        relative = [row["milliseconds"][name] / row["milliseconds"]["ours, in place"] for row in rows]
        heights = [place + (i - len(names) / 2) * 0.1 for place in range(len(rows))]
        axes.barh(heights, relative, 0.09, label=name)
    axes.set_yticks(range(len(rows)), [f"{r['set']}, T={r['towers']}, {r['dtype']}" for r in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("time, as a multiple of ours in place (less is faster)")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", choices=PARAMETER_SETS, default=list(PARAMETER_SETS))
    parser.add_argument("--towers", nargs="+", type=int, default=[2, 4, 8], help="numbers of towers, at least 2")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, help="default: torch's own number")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each case")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-kernel"))
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    machine = {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    print({**machine, "device": str(options.device), "cpu_kernels": build_info()["cpu_kernels"]})
    rows: list[dict[str, Any]] = []
    for name in options.sets:
        for num_towers in options.towers:
            for dtype in options.dtypes:
                row = case(name, num_towers, getattr(torch, dtype), options.device, options.seconds)
                print_row(row, is_first=not rows)
                rows.append(row)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "kernel.json").write_text(json.dumps({**machine, **build_info(), "rows": rows}, indent=1))
    draw(rows, options.out / "kernel.png")
    print(f"wrote {options.out / 'kernel.json'} and {options.out / 'kernel.png'}")


if __name__ == "__main__":
    main()
