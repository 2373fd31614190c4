"""What nvdisasm says of a cubin: for each kernel its instructions and its registers.

python -m tests.cuda.sass CUBIN...      prints the table of registers in docs/cuda.md
"""

import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from .toolchain import require_nvdisasm

DTYPES = ("float32", "float64", "float16", "bfloat16")


@dataclass
class Kernel:
    """One kernel of a cubin. `towers`: its own count, 0 for any, None where there is none."""

    kind: str
    dtype: str | None
    towers: int | None
    argument_bytes: int
    registers: int = 0
    opcodes: list[str] = field(default_factory=list)


def parse_name(symbol):
    kind = re.search(r"\d+(tower_mean_kernel|tower_mean_with_statistics_kernel|finish\w+?)I", symbol)
    dtype = re.search(r"DTypeE(\d)", symbol)
    numbers = [int(n) for n in re.findall(r"Li(\d+)E", symbol)]
    return Kernel(
        kind=kind.group(1),
        dtype=DTYPES[int(dtype.group(1))] if dtype else None,
        towers=numbers[0] if len(numbers) == 2 else None,
        argument_bytes=numbers[-1],
    )


def kernels(cubin: Path) -> list[Kernel]:
    command = [require_nvdisasm(), str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    count = r"EIATTR_REGCOUNT\n(?:.*\n){1,6}?.*index@\((\S+)\)\n.*\.word\s+(0x\w+)"
    registers = dict(re.findall(count, text))
    found = []
    for section in re.split(r"\n\s*\.section\s+", text):
        name = re.match(r"\.text\.(\w+)", section)
        if name is not None:
            kernel = parse_name(name.group(1))
            kernel.registers = int(registers[name.group(1)], 16)
            kernel.opcodes = re.findall(r"\*/\s+(?:@!?\w+ )?([A-Z][A-Z0-9_.]*)", section)
            found.append(kernel)
    return found


def print_table(cubins):
    tables = {cubin.stem: {} for cubin in cubins}
    for cubin in cubins:
        for kernel in kernels(cubin):
            towers = {None: "", 0: "any T"}.get(kernel.towers, f"T = {kernel.towers}")
            row = (kernel.kind.removesuffix("_kernel"), kernel.dtype or "", towers)
            tables[cubin.stem].setdefault(row, []).append(kernel.registers)
    print("| kernel | dtype | towers |", " | ".join(tables), "|")
    print("|---|---|---|" + "---|" * len(tables))
    for row in sorted(next(iter(tables.values()))):
        print("|", *[f"{cell} |" for cell in row], *[f"{max(t[row])} |" for t in tables.values()])


if __name__ == "__main__":
    print_table([Path(name) for name in sys.argv[1:]])
