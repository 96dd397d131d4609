"""What a kernel may learn of a user's function of cells without running it over all of them.

Note [kept]: what a kernel makes from a function once, such as which blocks a mask leaves, is kept with the function, which must
go on giving the same: where what it reads changes, a new mask or score is due. A tensor that it captures may be written to by
operations that PyTorch counts, `versions`; the replay of a CUDA graph and collectives are not among them.

Note [traced functions]: a compiler that is handed a user's function as it is would find the globals of its module, not the
tensors put in their places. So the function is run once and its operations are kept, with every tensor an argument. And
flex_attention compiles the gradient of a tensor that is indexed by scalars in one place: one read in several places comes as
several arguments, and a scalar as one value a query row.

Note [indices]: a compiled flex_attention reads before a tensor's beginning where an index is below zero, so what counts from
the end is made to count from the beginning. And an index that is worked out from what was looked up has no shape for torch 2.11
and 2.12, which cannot compile the gradient then. So it is written as how far it is from the positions that it changes with.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from ring_attn.mask import Mask
from ring_attn.score_mod import captured, origin, recapture

Changes = dict[torch.fx.Node, list[torch.fx.Node]]
_PLAIN = int | float | str | torch.dtype | torch.device | None


@dataclass(frozen=True, eq=False)
class Itself:
    """A function that is like no other, whatever tensors it captures."""

    fn: Callable

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Itself) and self.fn is other.fn

    def __hash__(self) -> int:
        return id(self.fn)


def sameness(fn: Callable) -> Hashable:
    """Equal for two functions only if they do the same, but for the values of the tensors that they capture; see Note [kept].

    Functions of one code that read numbers, words, modules and tensors alone are told apart by these; any other is itself.
    """
    code = getattr(fn, "__code__", None)
    if not isinstance(fn, FunctionType) or any(isinstance(constant, CodeType) for constant in code.co_consts):
        return Itself(origin(fn))
    read = [cell.cell_contents for cell in fn.__closure__ or ()]
    read += [fn.__globals__[name] for name in code.co_names if name in fn.__globals__]
    read += [*(fn.__defaults__ or ()), *(fn.__kwdefaults__ or {}).values()]
    tensors: list[Tensor] = []
    told = [_told(value, tensors) for value in read]
    return Itself(origin(fn)) if None in told else (code, *told)


def _told(value: Any, tensors: list[Tensor]) -> Hashable:
    """What tells a value apart that a function reads, None where nothing does; `tensors`: those before it."""
    if isinstance(value, Tensor):
        first = next((n for n, x in enumerate(tensors) if x is value), len(tensors))
        tensors.append(value)
        return first, tuple(value.shape), value.dtype, value.device
    if isinstance(value, _PLAIN):
        return type(value), repr(value)
    return value if isinstance(value, ModuleType) else None


def versions(fn: Callable) -> tuple[int, ...]:
    """How often each tensor that a function captures was written to, as far as PyTorch counts."""
    return tuple([0 if x.is_inference() else x._version for x in captured(fn)])


def written_to(mask: Mask) -> tuple[tuple[int, ...], ...]:
    """The `versions` of a mask's functions: those of a forward are to be those of its backward, which asks them again."""
    return tuple([versions(predicate.fn) for rule in mask.rules() for predicate in rule.predicates])


def check_unwritten(mask: Mask, before: tuple[tuple[int, ...], ...]) -> None:
    """Raises RuntimeError unless what `written_to` told of the mask is as before."""
    if written_to(mask) != before:
        raise RuntimeError(
            "a tensor that the function of a MaskMod reads was written to between a forward and its backward, which asks the "
            "function again; write to it after the backward, or make each forward a MaskMod that reads a tensor of its own"
        )


def depends_on(fn: Callable, device: torch.device) -> tuple[bool, bool]:
    """Whether a mask's function of scalars (b, h, q_pos, kv_pos) depends on b, and whether on h."""
    return _depends(fn, 0, device), _depends(fn, 1, device)


def _depends(fn: Callable, argument: int, device: torch.device) -> bool:
    found = []

    def watched(x: Tensor) -> Tensor:
        scalars = [torch.zeros((), dtype=torch.int64, device=device) for _ in range(4)]
        result = fn(*scalars[:argument], x, *scalars[argument + 1 :])
        found.append(isinstance(result, Tensor) and torch._C._functorch.is_batchedtensor(result))
        return result

    with outside_of_ops():
        torch.vmap(watched)(torch.zeros(1, dtype=torch.int64, device=device))
    return found[0]


@dataclass(frozen=True, eq=False)
class Traced:
    """The operations of a function, see Note [traced functions]. Two are the same only if they are one object.

    `fn(row, *scalars, *tensors)`: the scalars are those the function takes, `row` the number of the query row. `uses`: how
    often each captured tensor stands among the tensors; `constants` follow them. `learns`: which of them get a gradient.
    `by_cell`: whether a tensor of at least 32 bits a number is read by query and key.
    """

    fn: Callable
    uses: tuple[int, ...]
    constants: tuple[Tensor, ...]
    by_cell: bool
    learns: tuple[bool, ...]

    def arguments(self, tensors: Sequence[Tensor], rows: int) -> tuple[Tensor, ...]:
        """The tensors of `fn` in place of the captured ones, for so many query rows; differentiable."""
        found = []
        for x, uses, learns in zip(tensors, self.uses, self.learns, strict=True):
            # flex_attention cannot be asked for a gradient that is not there.
            x = x if learns else x.detach()
            # Copies: a view would get no gradient from flex_attention, and nothing would say so.
            found += [any_size(x.expand(rows).clone(), 0) if x.dim() == 0 else x.clone() for _ in range(uses)]
        return (*found, *self.constants)


def any_size(x: Tensor, *dims: int) -> Tensor:
    """x, compiled code for which takes any size above 1 of these dimensions."""
    for dim in dims:
        torch._dynamo.maybe_mark_dynamic(x, dim)
    return x


def traced(fn: Callable, scalars: Sequence[Tensor]) -> Traced:
    """A function of scalars like these as its operations; made once for functions that are the same."""
    key = sameness(fn), *((x.dtype, x.device) for x in scalars)
    found = _traces.get(key)
    if found is None:
        while len(_traces) >= 1024:
            del _traces[next(iter(_traces))]
        found = _traces[key] = _trace(fn, scalars, captured(fn))
    return found


_traces: dict[Hashable, Traced] = {}


@torch.inference_mode(False)
def _trace(fn: Callable, scalars: Sequence[Tensor], tensors: Sequence[Tensor]) -> Traced:
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
    from torch.fx.experimental.proxy_tensor import make_fx

    # Copies, since autograd takes no tensor of inference mode.
    scalars, tensors = ([x.detach().clone() for x in given] for given in (scalars, tensors))

    def run(*inputs: Tensor) -> Tensor:
        return recapture(fn, inputs[len(scalars) :])(*inputs[: len(scalars)])

    with outside_of_ops(), torch.no_grad(), TransformGetItemToIndex():
        module = make_fx(run)(*scalars, *tensors)
    forward, *found = _with_arguments(module, len(scalars), tensors, getattr(fn, "__qualname__", "function"))
    with outside_of_ops(), torch.enable_grad(), TransformGetItemToIndex():
        learns = _learning(lambda leaves: run(*scalars, *leaves), tensors)
    return Traced(lambda *args: forward(None, *args), *found, learns)


def _learning(run: Callable, tensors: Sequence[Tensor]) -> tuple[bool, ...]:
    """Which of the tensors a result has a gradient of."""
    leaves = [x.clone().requires_grad_(x.dtype.is_floating_point) for x in tensors]
    result, wanted = run(leaves), [x for x in leaves if x.requires_grad]
    if not result.requires_grad:
        return (False,) * len(leaves)
    grads = iter(torch.autograd.grad(result, wanted, allow_unused=True))
    return tuple(x.requires_grad and next(grads) is not None for x in leaves)


def _with_arguments(module: torch.fx.GraphModule, scalars: int, tensors: Sequence[Tensor], name: str) -> tuple:
    """(fn, uses, constants, by_cell) of `Traced`, but for fn's first argument, which is the module."""
    graph = module.graph
    graph.eliminate_dead_code()
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    changes = _changes_with(graph, inputs[:scalars][-2:])
    by_cell = any(_by_cell(node, changes) for node in graph.nodes)
    _counted_from_the_beginning(graph, inputs[:scalars], changes)
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(inputs[0]):
        row = graph.placeholder("row")
    uses = [_spread(graph, node, row, x) for node, x in zip(inputs[scalars:], tensors, strict=True)]
    with graph.inserting_before(first):
        read = [node for node in graph.nodes if node.op == "get_attr"]
        for number, node in enumerate(read):
            node.replace_all_uses_with(graph.placeholder(f"constant{number}"))
    for node in list(graph.nodes):
        with graph.inserting_before(node):
            if node.target is torch.ops.aten.index.Tensor and None not in node.args[1]:
                node.replace_all_uses_with(graph.call_function(operator.getitem, (node.args[0], tuple(node.args[1]))))
            elif node.target is torch.ops.aten.lift_fresh_copy.default:
                node.replace_all_uses_with(node.args[0])
    graph.eliminate_dead_code()
    code = graph.python_code("self")
    names = dict(code.globals)
    exec(compile(code.src, f"<the operations of {name}>", "exec"), names)
    return names["forward"], tuple(uses), tuple(_attribute(module, node.target) for node in read), by_cell


def _by_cell(node: torch.fx.Node, changes: Changes) -> bool:
    """Whether a node reads a tensor as `Traced.by_cell` says."""
    if node.target is not torch.ops.aten.index.Tensor or node.meta["val"].itemsize < 4:
        return False
    return len(set().union(*(changes[index] for index in node.args[1] if index is not None))) == 2


def _counted_from_the_beginning(graph: torch.fx.Graph, scalars: Sequence[torch.fx.Node], changes: Changes) -> None:
    """Rewrites every index that is not one of the scalars, see Note [indices]."""
    for node in [node for node in graph.nodes if node.target is torch.ops.aten.index.Tensor]:
        table, indices = node.args
        found = list(indices)
        with graph.inserting_before(node):
            for dim, index in enumerate(indices):
                if index is not None and index not in scalars:
                    found[dim] = _from_the_beginning(graph, index, table.meta["val"].shape[dim])
                    for position in changes[index]:
                        away = graph.call_function(operator.sub, (found[dim], position))
                        found[dim] = graph.call_function(operator.add, (away, position))
        node.args = table, found


def _changes_with(graph: torch.fx.Graph, positions: Sequence[torch.fx.Node]) -> Changes:
    """Which of the positions each node changes with."""
    found: Changes = {}
    for node in graph.nodes:
        before = {node}.union(*(found[x] for x in node.all_input_nodes))
        found[node] = [position for position in positions if position in before]
    return found


def _from_the_beginning(graph: torch.fx.Graph, index: torch.fx.Node, size: int) -> torch.fx.Node:
    below, from_the_end = (graph.call_function(fn, (index, x)) for fn, x in ((operator.lt, 0), (operator.add, size)))
    return graph.call_function(torch.where, (below, from_the_end, index))


def _attribute(module: torch.fx.GraphModule, path: str) -> Tensor:
    return operator.attrgetter(path)(module)


def _spread(graph: torch.fx.Graph, node: torch.fx.Node, row: torch.fx.Node, x: Tensor) -> int:
    """Gives a tensor's placeholder one user and counts what then stands for it: a scalar's value at `row`, or more of them."""
    users = list(node.users)
    if not users:
        graph.erase_node(node)
        return 0
    with graph.inserting_after(node):
        if x.dim() == 0:
            value = graph.call_function(operator.getitem, (node, (row,)))
            for user in users:
                user.replace_input_with(node, value)
            return 1
        for number, user in enumerate(users[1:]):
            user.replace_input_with(node, graph.placeholder(f"{node.name}_again{number}"))
    return len(users)


@contextmanager
def outside_of_ops() -> Iterator[None]:
    """Inside, autograd, transforms and compilers work, which custom ops and TorchDispatchModes exclude."""
    with ExitStack() as stack:
        for key in _excluded(torch._C._dispatch_tls_local_exclude_set()):
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(key, False))
        yield


def _excluded(keys: torch._C.DispatchKeySet) -> tuple[torch._C.DispatchKey, ...]:
    """Those of the keys that a new thread does not exclude."""
    bits = keys.raw_repr()
    if bits not in _beyond_a_new_thread:
        with ThreadPoolExecutor(1) as pool:
            usual = pool.submit(torch._C._dispatch_tls_local_exclude_set).result()
        every = torch._C.DispatchKey.__members__.values()
        _beyond_a_new_thread[bits] = tuple(key for key in every if keys.has(key) and not usual.has(key))
    return _beyond_a_new_thread[bits]


_beyond_a_new_thread: dict[int, tuple[torch._C.DispatchKey, ...]] = {}
