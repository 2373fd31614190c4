"""The real launcher over ptxcheck: device memory, calls and findings. One library a process."""

import ctypes
import enum
from dataclasses import dataclass

import numpy as np

FLOAT32, FLOAT64, FLOAT16, BFLOAT16 = range(4)
BITS = {FLOAT32: np.uint32, FLOAT64: np.uint64, FLOAT16: np.uint16, BFLOAT16: np.uint16}
HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2


class Rule(enum.IntEnum):
    SUM, MEAN, WEIGHTED = range(3)


@dataclass
class Tensor:
    """Device memory whose allocation ends with its last element."""

    address: int
    numel: int
    dtype: int


class Statistics(ctypes.Structure):
    _fields_ = [(n, ctypes.c_void_p) for n in ("squares", "non_finite", "out_squares")]


class Emulator:
    def __init__(self, runtime, library):
        self.runtime = ctypes.CDLL(str(runtime), ctypes.RTLD_GLOBAL)
        self.library = ctypes.CDLL(str(library))
        for name in ("ptxcheck_text", "runtime_kernels", "runtime_never_run"):
            getattr(self.runtime, name).restype = ctypes.c_char_p
        self.library.entry_scratch_bytes.restype = ctypes.c_int64
        self.runtime.runtime_instructions.restype = ctypes.c_uint64

    def upload(self, bits, dtype, misalign=0):
        bits = np.ascontiguousarray(bits, BITS[dtype])
        tensor = self.empty(bits.size, dtype, misalign)
        self._copy(tensor.address, bits.ctypes.data, bits.nbytes, HOST_TO_DEVICE)
        return tensor

    def empty(self, numel, dtype, misalign=0):
        base = ctypes.c_void_p()
        size = numel * np.dtype(BITS[dtype]).itemsize + misalign
        assert self.runtime.cudaMalloc(ctypes.byref(base), ctypes.c_size_t(size)) == 0
        return Tensor(base.value + misalign, numel, dtype)

    def download(self, tensor):
        bits = np.empty(tensor.numel, BITS[tensor.dtype])
        self._copy(bits.ctypes.data, tensor.address, bits.nbytes, DEVICE_TO_HOST)
        return bits

    def _copy(self, to, source, size, kind):
        arguments = ctypes.c_void_p(to), ctypes.c_void_p(source), ctypes.c_size_t(size), kind
        assert self.runtime.cudaMemcpy(*arguments) == 0

    def tower_mean(self, outs, grads, rule, weights, *, statistics=False, driver=13000, seed=0):
        """grads: for each parameter a list over towers. Returns the statistics' arrays, if any."""
        count, num_towers = len(outs), len(weights)
        addresses = [tower.address for parameter in grads for tower in parameter]
        described = (
            (ctypes.c_void_p * count)(*[out.address for out in outs]),
            (ctypes.c_void_p * len(addresses))(*addresses),
            (ctypes.c_int64 * count)(*[out.numel for out in outs]),
            (ctypes.c_int8 * count)(*[parameter[0].dtype for parameter in grads]),
        )
        sizes = ctypes.c_int64(count), ctypes.c_int64(num_towers)
        results, pointers, scratch = [], None, None
        if statistics:
            results = [
                self.empty(num_towers * count, FLOAT64),
                self.empty(num_towers * count, FLOAT64),
                self.empty(count, FLOAT64),
            ]
            pointers = ctypes.byref(Statistics(*[result.address for result in results]))
            size = self.library.entry_scratch_bytes(*sizes, *described)
            scratch = ctypes.c_void_p(self.empty(size // 8, FLOAT64).address)
        self.runtime.ptxcheck_seed(seed)
        error = self.library.entry_tower_mean(
            *sizes,
            *described,
            (ctypes.c_int8 * count)(*[out.dtype for out in outs]),
            int(rule),
            (ctypes.c_double * num_towers)(*weights),
            pointers,
            scratch,
            driver,
        )
        assert error == 0, f"the launcher returned {error}: {self.findings()}"
        if not statistics:
            return None
        squares, non_finite, out_squares = map(self.download, results)
        return (
            squares.view(np.float64).reshape(num_towers, count),
            non_finite.view(np.int64).reshape(num_towers, count),
            out_squares.view(np.float64),
        )

    def findings(self):
        """Without the notes, which say no more than that an argument is larger than 4 KB."""
        lines = self.runtime.ptxcheck_text().decode().splitlines()
        return [line for line in lines if not line.startswith("note-param-over-4K")]

    def never_run(self):
        """PTX lines that no launch reached, for each kernel."""
        lines = self.runtime.runtime_kernels().decode().splitlines()
        names = [line.split()[0] for line in lines]
        return {name: self.runtime.runtime_never_run(name.encode()).decode().splitlines() for name in names}
