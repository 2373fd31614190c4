"""`TowerParallel`: one module, a replica on every device, one set of parameters for the optimizer."""

from __future__ import annotations

import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchtower._extension import build_info
from torchtower.averaging import normalized_weights
from torchtower.batch_norm import warn_of_process_norms
from torchtower.batches.gather import Column, check_rows_fit, gather_structure
from torchtower.batches.nested import map_tensors
from torchtower.batches.scatter import size_along
from torchtower.bridge.held import HeldGradients
from torchtower.bridge.ports import Port
from torchtower.compiled import is_compiled_function
from torchtower.devices import DeviceId, move, parse_device_ids, parse_output_device
from torchtower.forward_result import ForwardResult
from torchtower.losses import check_alike, check_leads_to_replicas, loss_and_weight, mean_over_towers, warn_of_backward
from torchtower.reduction import Grad
from torchtower.shards import Shards, cut, from_scatter
from torchtower.steps import Module, Steps
from torchtower.threads.locks import is_held_here
from torchtower.threads.rounds import current_tower
from torchtower.threads.thread_state import transforming, untraced
from torchtower.towers import Towers

_BUFFER_POLICIES = ("main", "mean")


class TowerParallel(Steps[Module]):
    """Run a module's replicas on several devices in parallel, each in a thread of its own (a *tower*).

    Stands in for ``nn.DataParallel``: ``out = model(x)`` splits the batch by rows, runs every tower's forward, and
    gathers the outputs; ``backward()`` of any loss over them runs every tower's backward in that tower's thread and
    leaves in ``p.grad`` what the plain module on the whole batch would have. `tower_loss` is the other call style:
    every tower computes its own loss on its shard, and the gradients are averaged. Both reduce all gradients in one
    fused native pass.

    With one tower (no ``device_ids`` and no accelerator, say) calls go straight to ``module``. A subclass may cut
    batches and join outputs in its own way, by a ``scatter`` or ``gather`` such as nn.DataParallel's.

    Args:
        module: the module to train. Its parameters and buffers lie on the main tower's device, the first of
            ``device_ids``, and stay the only ones that an optimizer sees.
        device_ids: one entry a tower: indices of the accelerator's devices, ``torch.device``, or names, ``"cpu"``
            repeatedly. None: every device of the accelerator, or one CPU tower where there is none.
        output_device: where gathered outputs go. None: the main tower's device.
        dim: along which inputs are split and outputs joined.
        buffers: whose buffers persist: ``"main"``, the main tower's (as nn.DataParallel's), or ``"mean"``, the mean
            over towers weighted by rows, of floating-point ones.
        max_concurrency: how many towers work at once; the others take turns. None: as many as there are cores. It
            changes no bit of any result.

    Attributes:
        module: the wrapped module.
        devices: the towers' devices, in tower order.
        tower_losses: each tower's loss of the last `tower_loss`.

    Raises:
        ValueError: devices that do not exist or differ in type; ``max_concurrency`` below 1; an unknown ``buffers``
            policy; at the first call parameters on another device than the main tower's, lazy or sparse ones.
        TypeError: ``module`` is none; ``device_ids`` lists something else than devices, or is a number; ``dim`` or
            ``max_concurrency`` is no int; a subclass overrides ``replicate`` or ``parallel_apply`` alone.
        RuntimeError: CUDA towers without the CUDA kernels built in.

    Example:
        >>> model = TowerParallel(torch.nn.Linear(3, 2), device_ids=["cpu", "cpu"])
        >>> model(torch.ones(5, 3)).shape
        torch.Size([5, 2])

    Source:
        ``torch.nn.DataParallel`` for the interface; the towers of TensorFlow 1's CIFAR-10 tutorial.
    """

    def __init__(
        self,
        module: Module,
        device_ids: Sequence[DeviceId] | None = None,
        output_device: DeviceId | None = None,
        dim: int = 0,
        *,
        buffers: str = "main",
        max_concurrency: int | None = None,
    ) -> None:
        nn.Module.__init__(self)
        if not isinstance(module, nn.Module):
            got = f"the class {module.__name__}; make one" if isinstance(module, type) else type(module).__name__
            raise TypeError(f"TowerParallel: expected an nn.Module, but got {got}")
        for name, value in (("dim", dim), ("max_concurrency", 1 if max_concurrency is None else max_concurrency)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"TowerParallel: expected {name} to be an int, but got {value!r}")
        if max_concurrency is not None and max_concurrency < 1:
            raise ValueError(f"TowerParallel: expected max_concurrency of at least 1, but got {max_concurrency}")
        if buffers not in _BUFFER_POLICIES:
            raise ValueError(f"TowerParallel: expected buffers to be one of {_BUFFER_POLICIES}, but got {buffers!r}")
        self._check_steps(TowerParallel.forward)
        self.devices = parse_device_ids(device_ids)
        _check_kernels(self.devices)
        self.module = module
        self.dim = dim
        self.device_ids = [d.type if d.index is None else d.index for d in self.devices]
        main = self.devices[0]
        self.output_device: Any = main
        if output_device is not None:
            self.output_device = parse_output_device(output_device)
        if len(self.devices) > 1:
            warn_of_process_norms(module)
        elif main.type != "cpu":
            module.to(main)  # as nn.DataParallel does with one device
        self.src_device_obj = main
        self.buffer_policy = buffers
        self.max_concurrency = max_concurrency
        self.tower_losses: list[Tensor] = []
        self._start()

    def _start(self) -> None:
        # What pickling and copying leave out, since threads and locks cannot follow.
        self._towers: Towers | None = None
        self._held = HeldGradients()
        self._checked: weakref.WeakSet[Any] = weakref.WeakSet()
        self._lock = threading.RLock()
        self._closer: weakref.finalize[Any, Any] | None = None
        _wrappers.add(self)

    def extra_repr(self) -> str:
        """What ``repr`` says beside the module."""
        return f"devices={[str(device) for device in self.devices]}"

    @property
    def num_towers(self) -> int:
        """How many towers there are; a batch with fewer rows leaves the last ones idle."""
        return len(self.devices)

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run the module on the whole batch, each tower on its rows.

        Args:
            *inputs: nested containers (tuples, lists, dicts, dataclasses) of anything. Every tensor is split along
                ``dim``, as evenly as its rows allow; a tensor without that dimension, or with one row where others
                have more, goes to every tower, and so does whatever is no tensor. Where no tensor has rows to split,
                the main tower runs alone.
            **kwargs: likewise.

        Returns:
            The module's output, every tensor gathered along ``dim`` on ``output_device``. 0-d outputs become a vector
            with one element a tower. What is no tensor must be alike in every tower.

        Raises:
            Exception: what a tower raised; its words name the tower and its device.
            RuntimeError: at the first call that builds a graph, a tower has used another's parameters.
            ValueError: a sparse or nested tensor or a PackedSequence among the inputs; one with a graph that the module
                writes into and changes the shape of in place; outputs that differ in structure between towers, or
                cannot be joined along ``dim``.
            TypeError: an output that holds tensors and cannot be joined (a distribution, a PackedSequence).
        """
        if self._is_alone():
            return self._forward_alone(inputs, kwargs)
        run = self._forward_untraced if torch.compiler.is_compiling() else self._forward_on_towers
        return run(inputs, kwargs)

    def _forward_on_towers(self, inputs: Any, kwargs: Any) -> Any:
        if is_held_here(self._lock):  # a signal's handler, in the middle of another call
            return self._forward_alone(inputs, kwargs)
        self._check_steps(TowerParallel.forward)  # one may have been put on this very wrapper
        shards = self._shards(inputs, kwargs, self._overrides("scatter"))
        with self._lock:
            result = self._running().run(_call_module, shards)
            if not self._overrides("gather"):
                return self._gather(result)
            outputs = result.connect_each()
        return self.gather(outputs, self.output_device)

    @untraced
    def _forward_untraced(self, inputs: Any, kwargs: Any) -> Any:
        out = self._forward_on_towers(inputs, kwargs)
        self._warn_of_compiler()
        return out

    def _warn_of_compiler(self) -> None:
        if self._towers is not None and not self._towers.is_compiled:
            warnings.warn(
                "TowerParallel: expected to be called outside of what torch.compile compiles, which stops at a wrapper "
                "and leaves what its towers do as it is; wrap the compiled module, TowerParallel(torch.compile(net)), "
                "or call the wrapper's compile()",
                stacklevel=2,
            )

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the module, once for all towers.

        Args:
            *args: as of ``nn.Module.compile``.
            **kwargs: likewise.
        """
        self.module.compile(*args, **kwargs)

    def _shards(self, inputs: Any, kwargs: Any, own_scatter: bool) -> Shards:
        if own_scatter:
            return from_scatter(self._scattered(inputs, kwargs), self.dim)
        return cut((inputs, kwargs or None), self.num_towers, self.dim)

    def _gather(self, result: ForwardResult) -> Any:
        def join(columns: list[Column]) -> list[Grad]:
            if len(result.rows) > 1:
                for column in columns:
                    check_rows_fit(column, self.dim)
            ports = [self._output_port(parts) for _, parts in columns]
            return result.connect([1.0] * len(result.rows), ports, [parts for _, parts in columns])

        return gather_structure(result.outputs, join, result.to_user)

    def _output_port(self, parts: list[Tensor]) -> Port:
        if parts[0].dim() == 0:
            return Port("rows", self.output_device)
        dim = self.dim if size_along(parts[0], self.dim) >= 0 else 0  # of the main tower's alone, as it is
        return Port("rows", self.output_device, tuple([part.shape[dim] for part in parts]), dim)

    def tower_loss(self, loss_fn: Callable[..., Any], *batch: Any, **kwargs: Any) -> Tensor:
        """Let every tower compute its own loss on its shard; the result's ``backward()`` averages their gradients.

        The TensorFlow program's way. Each tower's loss is a mean over its own rows; the mean over towers is weighted
        by rows, so that uneven shards do not change the result.

        Args:
            loss_fn: called as ``loss_fn(replica, *shard, **shard_kwargs)`` in every tower's thread, with that tower's
                replica of ``module``, which it must use in place of ``module`` and its parameters. Returns the tower's
                loss, a tensor of one element, or ``(loss, weight)`` where rows are not the right weight (tokens, say);
                never ``(loss, accuracy)``. A tower of weight 0 is left out, even if its loss is not finite.
            *batch: split as `forward` splits its inputs.
            **kwargs: likewise.

        Shape:
            The loss is 0-d. ``tower_losses`` afterwards holds each tower's own, detached and 0-d, in tower order, of
            the towers that had rows.

        Returns:
            The weighted mean of the towers' losses on the main tower's device.

        Raises:
            Exception: what a tower raised; its words name the tower and its device.
            ValueError: a loss that is not floating or has not one element; losses of several dtypes; weights negative,
                NaN, infinite or all zero; at the first call of ``loss_fn`` that builds a graph, a loss that depends on
                the module's own parameters.
            TypeError: ``loss_fn`` is not callable; a second value that is no real number.

        Example:
            >>> model = TowerParallel(torch.nn.Linear(3, 2), device_ids=["cpu", "cpu"])
            >>> def loss_fn(replica, x, y):
            ...     return torch.nn.functional.mse_loss(replica(x), y)
            >>> loss = model.tower_loss(loss_fn, torch.ones(5, 3), torch.zeros(5, 2))
            >>> loss.backward()
            >>> len(model.tower_losses)
            2

        Source:
            ``tower_loss`` and ``average_gradients`` of TensorFlow 1's CIFAR-10 tutorial.
        """
        if not callable(loss_fn):
            raise TypeError(
                f"TowerParallel.tower_loss: expected loss_fn to be callable, but got {type(loss_fn).__name__}"
            )
        if self._is_alone():
            return self._tower_loss_alone(loss_fn, batch, kwargs)
        run = self._tower_loss_untraced if torch.compiler.is_compiling() else self._tower_loss_on_towers
        mean: Tensor = run(loss_fn, batch, kwargs)
        return mean

    def _tower_loss_alone(self, loss_fn: Callable[..., Any], batch: Any, kwargs: Any) -> Tensor:
        batch, kwargs = self._moved((batch, kwargs))
        loss, weight = loss_and_weight(loss_fn(self._module_here(), *batch, **kwargs), 0)
        normalized_weights([1.0 if weight is None else weight], 1, "TowerParallel.tower_loss")
        self.tower_losses = [loss.detach().clone()]
        return loss

    def _tower_loss_on_towers(self, loss_fn: Callable[..., Any], batch: Any, kwargs: Any) -> Tensor:
        if is_held_here(self._lock):
            return self._tower_loss_alone(loss_fn, batch, kwargs)
        # One that goes with a forward of its own may take what only that hands to it.
        own_scatter = self._overrides("scatter") and type(self).forward is TowerParallel.forward
        shards = self._shards(batch, kwargs, own_scatter)

        def call(replica: nn.Module, shard: Any) -> Any:
            own, named = shard
            return loss_fn(replica, *own, **(named or {}))

        with self._lock:
            towers = self._running()
            result = towers.run(call, shards, loss_fn)
            if towers.went_backward:
                warn_of_backward()
            pairs = [loss_and_weight(output, t) for t, output in enumerate(result.outputs)]
            check_alike(pairs)
            check_leads_to_replicas(loss_fn, pairs[0][0], towers.module, towers.main_leaves, self._checked)
            mean = mean_over_towers(result, pairs, self.devices[0])
        self.tower_losses = [loss.detach() for loss, _ in pairs]
        return mean

    @untraced
    def _tower_loss_untraced(self, loss_fn: Callable[..., Any], batch: Any, kwargs: Any) -> Tensor:
        loss = self._tower_loss_on_towers(loss_fn, batch, kwargs)
        if not is_compiled_function(loss_fn):
            self._warn_of_compiler()
        return loss

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Within this context, backward accumulates gradients in each tower and reduces nothing.

        The first backward of a forward outside of it reduces all that was kept back, together with its own and what
        else it goes through, into ``p.grad``. As in DistributedDataParallel, what counts is where the forward runs;
        unlike there, ``p.grad`` stays untouched until then (with one tower nothing is kept back, and nothing of a
        backward with ``create_graph=True``). Gradients kept back are dropped by the ``zero_grad`` of an optimizer or a
        module that has the parameters; setting ``p.grad`` to None oneself does not drop them.

        Example:
            >>> model = TowerParallel(torch.nn.Linear(3, 2), device_ids=["cpu", "cpu"])
            >>> with model.no_sync():
            ...     model(torch.ones(4, 3)).sum().backward()
            >>> model.module.weight.grad is None
            True
            >>> model(torch.ones(4, 3)).sum().backward()
            >>> model.module.weight.grad[0]
            tensor([8., 8., 8.])

        Source:
            ``torch.nn.parallel.DistributedDataParallel.no_sync``.
        """
        if current_tower() is not None:
            yield
            return
        held = self._held
        before, held.synchronize = held.synchronize, False
        try:
            yield
        finally:
            held.synchronize = before

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients, those that `no_sync` has kept back too."""
        super().zero_grad(set_to_none)
        self._held.drop_all()  # those of parameters that have been replaced, too

    def _is_alone(self) -> bool:
        # While the interpreter shuts down, no other thread runs.
        return self.num_towers == 1 or current_tower() is not None or transforming() or sys.is_finalizing()

    def _module_here(self) -> Any:
        # A loss function that calls the wrapper itself means its tower's replica. Within another wrapper's tower this
        # may be a replica of the wrapper, whose own module is the one.
        towers = self._towers  # once: another thread may be closing
        replica = None if towers is None else towers.replica_here()
        return self.module if replica is None else replica

    def _forward_alone(self, inputs: Any, kwargs: Any) -> Any:
        inputs, kwargs = self._moved((inputs, kwargs))
        output = self._module_here()(*inputs, **kwargs)
        stays = current_tower() is not None or self.output_device == self.devices[0]
        return output if stays else map_tensors(lambda t: move(t, self.output_device), output)

    def _moved(self, batch: Any) -> Any:
        main = self.devices[0]
        if main.type == "cpu" or current_tower() is not None:
            return batch
        if self.num_towers == 1 and self._overrides("scatter"):
            (batch,) = self._scattered(*batch)
        return map_tensors(lambda t: move(t, main), batch)

    def _running(self) -> Towers:
        towers = self._towers
        # It may have been replaced. The first look is where nn.Module keeps it, whose own takes ten times as long.
        if towers is None or (towers.module is not self._modules.get("module") and towers.module is not self.module):
            self.close()
            towers = Towers(self.module, self.devices, self.max_concurrency, self.buffer_policy, self._held, self._lock)
            # Runs when this wrapper is collected and before the interpreter exits.
            self._closer = weakref.finalize(self, towers.pool.close)
            self._towers = towers
        return towers

    def train(self, mode: bool = True) -> Any:
        """As of ``nn.Module``; programs swap weights around a change between training and evaluation.

        Args:
            mode: whether to train.
        """
        if mode is not self.module.training:
            self.refresh()
        return super().train(mode)

    def refresh(self) -> None:
        """Let the next call bring the replicas on other devices up to date, whatever changed the parameters.

        Needed only where nothing tells of the change: a write through ``p.data`` or from numpy when no change between
        training and evaluation lies between two calls, and for a trainable parameter neither a backward nor an
        optimizer's step.

        Example:
            >>> model = TowerParallel(torch.nn.Linear(3, 2), device_ids=["cpu", "cpu"])
            >>> model.module.weight.data.zero_()
            tensor([[0., 0., 0.],
                    [0., 0., 0.]])
            >>> model.refresh()
        """
        towers = self._towers  # without the lock: whoever calls may be a tower, whose caller holds it
        if towers is not None:
            towers.refresh()

    def close(self) -> None:
        """End the towers' threads and drop the replicas; the next call starts anew."""
        closer = self._closer
        self._towers = self._closer = None
        if closer is not None:
            closer()

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_towers", "_lock", "_closer", "_held", "_checked")
        state = {name: value for name, value in self.__dict__.items() if name not in left_out}
        state["tower_losses"] = []
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._start()


def _start_all() -> None:
    # In a forked child: another thread may have been in the middle of a forward.
    for wrapper in list(_wrappers):
        wrapper._start()


_wrappers: weakref.WeakSet[TowerParallel[Any]] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_all)


def _call_module(replica: nn.Module, shard: Any) -> Any:
    inputs, kwargs = shard
    return replica(*inputs, **(kwargs or {}))


def _check_kernels(devices: Sequence[torch.device]) -> None:
    if any(device.type == "cuda" for device in devices) and not build_info()["cuda"]:
        raise RuntimeError(
            "TowerParallel: expected CUDA kernels for towers on "
            f"{[str(device) for device in devices]}, but torchtower was built without them; rebuild it where nvcc is "
            "on PATH: TORCHTOWER_CUDA=ON pip install --no-build-isolation --force-reinstall --no-deps torchtower"
        )
