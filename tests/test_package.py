"""What the package promises about itself: light to import, documented, layered, and clear where it was not built."""

from __future__ import annotations

import ast
import inspect
import sys
from pathlib import Path

import pytest

import torchtower
from tests.helpers import ROOT, run_python

SOURCE = ROOT / "torchtower"
HEAVY = [
    "torch.distributed.algorithms", "torch.distributed.fsdp", "torch.distributed.optim", "torch.distributed.rpc",
    "torch.distributed.tensor", "torch._dynamo", "torch._inductor", "torch.utils.tensorboard", "torch.onnx",
    "matplotlib", "sklearn", "scipy", "tensorboard", "rich", "pandas", "PIL", "lightning", "transformers",
]  # fmt: skip
# Arrows point down only, as CONTRIBUTING.md draws them: a room imports from itself and from those below it.
LAYERS = [
    {"_extension", "devices", "parts", "flat", "memory"},
    {"_composed", "ops", "reduction", "averaging"},
    {"batches"},
    {"threads"},
    {"bridge"},
    {"replicas"},
    {"shards", "forward_result", "towers", "losses", "steps", "compiled", "batch_norm"},
    {"parallel"},
    {"__init__"},
    {"checkpoint", "training"},
    {"cli"},
    {"__main__"},
]
LEAVES = ("training", "integrations")


def modules() -> dict[str, Path]:
    """Every module of the package by its name below ``torchtower``."""
    return {".".join(path.relative_to(SOURCE).with_suffix("").parts): path for path in sorted(SOURCE.rglob("*.py"))}


def imports_of(path: Path) -> set[str]:
    """What a module imports of the package, anywhere in it, by the names that `modules` uses."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torchtower":
            below = (node.module or "").partition(".")[2]
            names = [f"{below}.{alias.name}".strip(".") for alias in node.names]
            found |= {name if name in modules() else below for name in names}
        elif isinstance(node, ast.Import):
            found |= {a.name.partition(".")[2] for a in node.names if a.name.split(".")[0] == "torchtower"}
    return {name for name in found if name and name in modules()}


@pytest.fixture(scope="module")
def imported() -> set[str]:
    """The modules that ``import torchtower`` adds to those of ``import torch``."""
    done = run_python(
        "import sys, torch\nbefore = set(sys.modules)\nimport torchtower\nprint(*set(sys.modules) - before)"
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_the_package_imports_nothing_heavy(imported: set[str]) -> None:
    assert not [name for name in imported if any(name == heavy or name.startswith(heavy + ".") for heavy in HEAVY)]
    assert not [name for name in imported if name.startswith("torchtower.") and name.split(".")[1] in LEAVES]


def test_importing_the_package_adds_few_modules_to_torchs(imported: set[str]) -> None:
    strange = {name for name in imported if name.split(".")[0] not in {"torchtower", "torch", *sys.stdlib_module_names}}
    assert not strange


def test_importing_the_package_changes_nothing_in_torch() -> None:
    done = run_python("""
import torch
before = (torch.get_num_threads(), torch.random.default_generator, torch.get_default_dtype(), torch.initial_seed())
state = torch.get_rng_state()
import threading, torchtower
after = (torch.get_num_threads(), torch.random.default_generator, torch.get_default_dtype(), torch.initial_seed())
assert before == after, (before, after)
assert torch.equal(state, torch.get_rng_state())
assert threading.active_count() == 1
assert not torch.distributed.is_initialized()
""")
    assert done.returncode == 0, done.stderr


PUBLIC = [getattr(torchtower, name) for name in torchtower.__all__]
MEMBERS = [
    member
    for kind in PUBLIC
    if inspect.isclass(kind)
    for name, member in vars(kind).items()
    if not name.startswith("_") and callable(member)
]


def test_the_public_names_are_listed_in_order_and_exist() -> None:
    assert torchtower.__all__ == sorted(torchtower.__all__)
    others = {n for n in vars(torchtower) if not n.startswith("_")} - set(torchtower.__all__)
    assert {n for n in others if not inspect.ismodule(getattr(torchtower, n))} == set()


@pytest.mark.parametrize("thing", PUBLIC, ids=torchtower.__all__)
def test_every_public_name_is_documented_with_an_example(thing: object) -> None:
    doc = inspect.getdoc(thing) or ""
    assert "Example:" in doc and ">>>" in doc, "an example that runs"
    takes = [p for p in inspect.signature(thing).parameters if p not in ("self", "args", "kwargs")]  # type: ignore[arg-type]
    for name in takes:
        assert f"\n    {name}" in doc or f"\n    *{name}" in doc, f"{name} is not told"
    if takes:
        assert "Args:" in doc
    if not inspect.isclass(thing):
        assert "Returns:" in doc


@pytest.mark.parametrize("member", MEMBERS, ids=lambda member: member.__qualname__)
def test_every_public_method_is_documented(member: object) -> None:
    doc = inspect.getdoc(member) or ""
    assert doc
    for name in inspect.signature(member).parameters:  # type: ignore[arg-type]
        if name not in ("self", "set_to_none"):
            assert name in doc, f"{name} is not told"


@pytest.mark.parametrize("name", ["TowerParallel", "average_gradients", "stack_gradients"])
def test_what_takes_gradients_or_batches_tells_shapes_errors_and_its_source(name: str) -> None:
    doc = inspect.getdoc(getattr(torchtower, name)) or ""
    if name == "TowerParallel":
        doc += inspect.getdoc(torchtower.TowerParallel.tower_loss) or ""
    for section in ("Raises:", "Shape:"):
        assert section in doc
    assert name == "stack_gradients" or "Source:" in doc


@pytest.mark.parametrize("name", modules())
def test_every_module_says_what_it_is_for(name: str) -> None:
    assert ast.get_docstring(ast.parse(modules()[name].read_text(encoding="utf-8")))


def _layer(name: str) -> int:
    room = name.split(".")[0]
    return next(index for index, layer in enumerate(LAYERS) if room in layer)


@pytest.mark.parametrize("name", modules())
def test_imports_point_down_only(name: str) -> None:
    for used in imports_of(modules()[name]):
        assert _layer(used) <= _layer(name), f"{name} imports {used}"


@pytest.mark.parametrize("name", modules())
def test_nobody_imports_a_leaf_or_the_roof_but_the_command_line(name: str) -> None:
    if name.split(".")[0] in (*LEAVES, "cli", "__main__"):
        return
    for used in imports_of(modules()[name]):
        assert used.split(".")[0] not in (*LEAVES, "cli", "__main__"), f"{name} imports {used}"


def test_there_is_no_circle_of_imports() -> None:
    graph = {name: imports_of(path) for name, path in modules().items()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"circle: {' -> '.join((*above, name))}"
        if name not in done:
            for used in graph.get(name, ()):
                visit(used, (*above, name))
            done.add(name)

    for name in graph:
        if name != "__init__":
            visit(name, ())


def test_without_the_built_extension_the_import_says_how_to_build_it() -> None:
    done = run_python("""
import sys
sys.modules["torchtower._C"] = None
try:
    import torchtower
except ImportError as error:
    words = str(error)
    assert "torchtower._C" in words and "pip install --no-build-isolation" in words, words
else:
    raise SystemExit("it was imported")
""")
    assert done.returncode == 0, done.stderr


def test_cuda_towers_without_cuda_kernels_are_refused_at_construction() -> None:
    if torchtower.build_info()["cuda"]:
        pytest.skip("CUDA kernels are built in")
    import torch

    from torchtower.parallel import _check_kernels

    with pytest.raises(RuntimeError, match=r"built without them; rebuild it .*TORCHTOWER_CUDA=ON"):
        _check_kernels([torch.device("cuda:0")])


def test_the_package_ships_its_types_and_no_vendor_is_named_outside_its_room() -> None:
    assert (SOURCE / "py.typed").exists()
    for name, path in modules().items():
        text = path.read_text(encoding="utf-8")
        assert "torch.cuda." not in text or name in ("cli",) or name.startswith("training"), name
