"""Activations that hooks keep, wherever they keep them, are part of the user's graph."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import EVERY_COUNT, SEVERAL, assert_close, assert_same_gradients, batch, mlp, run_python, twins, wrap
from torchtower import current_tower

_global_features: list[Tensor] = []
_global_feature: Any = None


def _keep_in_a_global_list(module: nn.Module, args: Any, output: Tensor) -> None:
    _global_features.append(output)


def _keep_in_a_global_name(module: nn.Module, args: Any, output: Tensor) -> None:
    global _global_feature
    _global_feature = output


class _Extractor:
    def __init__(self) -> None:
        self.feature: Any = None
        self.by_name: dict[str, list[Tensor]] = collections.defaultdict(list)

    def hook(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.feature = output

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.by_name["out"].append(output)


class _ExtractorModule(nn.Module):
    def hook(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.feature = output


_global_extractor = _Extractor()


def _keep_in_a_global_object(module: nn.Module, args: Any, output: Tensor) -> None:
    _global_extractor.by_name["out"].append(output)


class _Features(list[Any]):
    """A list of a class of one's own."""


def _hooks() -> list[tuple[str, Any, Callable[[], list[Tensor]]]]:
    closed: list[Tensor] = []
    by_default: list[Tensor] = []
    named: dict[str, Any] = {}
    pairs: list[Any] = []
    caller = _Extractor()
    by_method: list[Tensor] = []
    own = _Features()
    nested: list[Any] = []
    add = by_method.append

    def keep(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        named.setdefault(name, []).append(output)

    return [
        ("closure", lambda m, i, o: closed.append(o), lambda: closed),
        ("default", lambda m, i, o, kept=by_default: kept.append(o), lambda: by_default),
        ("tuples", lambda m, i, o: pairs.append(("out", o)), lambda: [o for _, o in pairs]),
        ("method of a list", lambda m, i, o: add(o), lambda: by_method),
        ("list of an own class", lambda m, i, o: own.append(o), lambda: own),
        ("tuples in tuples", lambda m, i, o: nested.append(("out", (1, o))), lambda: [o for _, (_, o) in nested]),
        ("global object", _keep_in_a_global_object, lambda: _global_extractor.by_name["out"]),
        ("partial", functools.partial(keep, "out"), lambda: named["out"]),
        ("callable object", caller, lambda: caller.by_name["out"]),
        ("global list", _keep_in_a_global_list, lambda: _global_features),
    ]


@pytest.mark.parametrize("index", range(10), ids=[name for name, _, _ in _hooks()])
@pytest.mark.parametrize("num_towers", SEVERAL)
def test_activations_that_a_hook_keeps_lead_to_the_parameters(index: int, num_towers: int) -> None:
    grads = []
    for net in twins(mlp(), num_towers):
        _, hook, features = _hooks()[index]
        _global_features.clear()
        _global_extractor.by_name.clear()
        getattr(net, "module", net)[0].register_forward_hook(hook)
        (net(batch(8)).square().sum() + sum(f.square().sum() for f in features())).backward()
        grads.append(net)
    assert_same_gradients(grads[1], grads[0])


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_what_a_hook_keeps_of_a_parameter_beside_the_module_leads_to_it(num_towers: int) -> None:
    found = []
    for net in twins(mlp(), num_towers):
        scale = torch.ones(5, dtype=torch.float64, requires_grad=True)
        scaled: list[Tensor] = []
        apart: list[Tensor] = []

        def keep(
            layer: nn.Module, args: Any, out: Tensor, scale: Tensor = scale, scaled: Any = scaled, apart: Any = apart
        ) -> None:
            scaled.append(out * scale)
            apart[:] = [scale * 3]

        getattr(net, "module", net)[0].register_forward_hook(keep)
        for seed in range(2):
            net(batch(8, seed=seed))
        sum([part.square().sum() for part in (*scaled, *apart)]).backward()  # type: ignore[union-attr]
        found.append((net, scale.grad))
    (plain, expected), (wrapped, got) = found
    assert_close(got, expected)
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("num_towers", EVERY_COUNT)
def test_what_a_module_beside_makes_of_activations_leads_to_both(num_towers: int) -> None:
    found = []
    for net in twins(mlp(), num_towers):
        torch.manual_seed(0)
        probe, probed = nn.Linear(5, 2).double(), []

        def keep(layer: nn.Module, args: Any, out: Tensor, probe: Any = probe, probed: Any = probed) -> None:
            probed.append(probe(out))

        getattr(net, "module", net)[0].register_forward_hook(keep)
        out = net(batch(8))
        (out.sum() + sum(part.square().sum() for part in probed)).backward()
        found.append((net, probe))
    (plain, expected), (wrapped, got) = found
    assert_same_gradients(wrapped, plain)
    assert_same_gradients(got, expected)


def _append(kept: list[Tensor], output: Tensor) -> None:
    kept.append(output)


_append_to_a_list_of_its_own = functools.partial(_append, [])


def _keep_by_a_global_function(module: nn.Module, args: Any, output: Tensor) -> None:
    _append_to_the_global_list(output)


def _append_to_the_global_list(output: Tensor) -> None:
    _append(_global_features, output)


def _keep_by_a_global_partial(module: nn.Module, args: Any, output: Tensor) -> None:
    _append_to_a_list_of_its_own(output)


def _hook_that_keeps(where: str) -> tuple[Any, Callable[[], list[Tensor]]]:
    in_list: list[Tensor] = []
    in_deque: collections.deque[Tensor] = collections.deque()
    in_dict: dict[Any, Tensor] = {}

    def by_keyword_default(module: nn.Module, args: Any, output: Tensor, *, kept: Any = in_list) -> None:
        kept.append(output)

    def by_deque(module: nn.Module, args: Any, output: Tensor, kept: Any = in_deque) -> None:
        kept.append(output)

    def by_dict(module: nn.Module, args: Any, output: Tensor, kept: Any = in_dict) -> None:
        kept[current_tower()] = output

    _global_features.clear()
    _append_to_a_list_of_its_own.args[0].clear()
    return {
        "keyword default": (by_keyword_default, lambda: in_list),
        "deque as a default": (by_deque, lambda: list(in_deque)),
        "dict as a default": (by_dict, lambda: list(in_dict.values())),
        "global function": (_keep_by_a_global_function, lambda: _global_features),
        "global partial": (_keep_by_a_global_partial, lambda: _append_to_a_list_of_its_own.args[0]),
    }[where]


@pytest.mark.parametrize(
    "where", ["keyword default", "deque as a default", "dict as a default", "global function", "global partial"]
)
def test_activations_kept_in_defaults_of_a_hook_or_by_what_it_calls_lead_to_the_parameters(where: str) -> None:
    plain, wrapped = twins(mlp(), 2)
    for net in (plain, wrapped):
        hook, features = _hook_that_keeps(where)
        getattr(net, "module", net)[0].register_forward_hook(hook)
        net(batch(8))
        sum(feature.square().sum() for feature in features()).backward()
    assert_same_gradients(wrapped, plain)


def test_the_newest_of_many_activations_in_a_global_list_lead_to_the_parameters() -> None:
    plain, wrapped = twins(mlp(), 2)
    for net in (plain, wrapped):
        _global_features[:] = [torch.zeros(1)] * 400
        getattr(net, "module", net)[0].register_forward_hook(_keep_in_a_global_list)
        net(batch(8))
        sum(feature.square().sum() for feature in _global_features).backward()
    assert_same_gradients(wrapped, plain)


def test_a_hook_may_close_over_itself() -> None:
    done = run_python("""
from tests.helpers import batch, mlp, wrap

net = mlp()

def hook(module, args, output):
    hook.kept = output

net[0].register_forward_hook(hook)
wrap(net, 2)(batch(4))
assert hook.kept.shape == (2, 5)
""")
    assert not done.returncode, done.stderr


def test_a_list_in_a_default_of_a_hook_that_leads_to_a_layer_has_every_towers_entries() -> None:
    net, kept = mlp(), []
    layer = net[0]

    def hook(module: nn.Module, args: Any, output: Tensor, kept: list[Any] = kept) -> None:
        assert module is layer
        kept.append(current_tower())

    layer.register_forward_hook(hook)
    wrap(net, 3)(batch(6))
    assert sorted(kept) == [0, 1, 2]


@pytest.mark.parametrize("sum_first", [True, False])
def test_activations_lead_to_the_parameters_though_a_hook_adds_them_up_over_towers_too(sum_first: bool) -> None:
    plain, wrapped = twins(mlp(), 2)
    for net in (plain, wrapped):
        kept: list[Tensor] = []
        total: list[Any] = [0.0]

        def add_up(module: nn.Module, args: Any, output: Tensor, total: list[Any] = total) -> None:
            total[0] = total[0] + output.sum()

        def keep(module: nn.Module, args: Any, output: Tensor, kept: list[Tensor] = kept) -> None:
            kept.append(output)

        for hook in (add_up, keep) if sum_first else (keep, add_up):
            getattr(net, "module", net)[0].register_forward_hook(hook)
        net(batch(8))
        sum(f.square().sum() for f in kept).backward()
    assert_same_gradients(wrapped, plain)


@pytest.mark.parametrize("kind", ["method", "method of a module apart", "global"])
def test_the_one_activation_that_a_hook_keeps_is_some_towers(kind: str) -> None:
    # Towers overwrite it in no order, as nn.DataParallel's replicas do: rows that are alike make them one.
    extractor: Any = _ExtractorModule() if kind == "method of a module apart" else _Extractor()
    hook = _keep_in_a_global_name if kind == "global" else extractor.hook
    plain, wrapped = twins(mlp(), 2)
    x = batch(1).expand(4, 3)
    for net in (plain, wrapped):
        getattr(net, "module", net)[0].register_forward_hook(hook)
        net(x)
        (_global_feature if kind == "global" else extractor.feature).mean(0).sum().backward()
    assert_same_gradients(wrapped, plain)


def test_what_hooks_kept_before_stays_as_it_is() -> None:
    features: list[Tensor] = []
    wrapped = wrap(mlp(), 2)
    wrapped.module[0].register_forward_hook(lambda m, i, o: features.append(o))
    wrapped(batch(4))
    first = list(features)
    wrapped(batch(4))
    assert len(features) == 4 and all(old is new for old, new in zip(first, features, strict=False))
