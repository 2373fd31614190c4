"""Load the compiled extension, or say how to build it.

Everything that needs the native ops imports this module first; nothing falls back when it is missing.
"""

import torch  # noqa: F401  (the extension links against the libraries that torch has loaded)

try:
    from torchtower import _C
except ImportError as error:
    raise ImportError(
        f"torchtower: expected the compiled extension torchtower._C, but it could not be loaded ({error}). "
        "Build it against the torch of this environment: "
        "pip install --no-build-isolation -e . (in a checkout) or "
        "pip install --no-build-isolation --force-reinstall --no-deps torchtower"
    ) from error

holds_only = _C.holds_only
memory_of = _C.memory_of
first_change = _C.first_change


def build_info() -> dict[str, str | bool]:
    """Tell how the compiled extension was built.

    Returns:
        ``version``: the package's version; ``built_with_torch``: the torch whose headers were used (the binary
        serves every torch >= 2.11); ``compiler``; ``cuda``: whether CUDA kernels are built in;
        ``cuda_architectures``: for which architectures, empty without CUDA; ``cpu_kernels``: the instruction
        set that this machine's CPU kernels use.

    Example:
        >>> sorted(build_info())
        ['built_with_torch', 'compiler', 'cpu_kernels', 'cuda', 'cuda_architectures', 'version']
    """
    return _C.build_info()
