"""Functions of tensors that Inductor compiles, called with as little beside their work as can be.

torch.compile looks through its guards at each call, and wraps the call in several layers of Python. Here that is done
once for each set of shapes; what it led to is then called directly.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable

import torch
from torch import Tensor

# sets of shapes that a function remembers; there are a few dozen in a network
_MOST_KNOWN = 1024
# loops over the same numbers are made one, and nothing between them is written to memory: neither by the count of its
# operations, nor by that of what they read, eight numbers unless told otherwise
_ONE_LOOP = {
    "realize_opcount_threshold": 100_000,
    "realize_reads_threshold": 100_000,
    "realize_acc_reads_threshold": 100_000,
    "cpp.max_horizontal_fusion_size": 1024,
}
# for each argument, the axes along which it may have any size
Sizes = tuple[tuple[int, ...], ...]


class CompiledFunction:
    """A function whose arguments are tensors, numbers, dtypes and None, and whose result is one tensor or a tuple.

    It is compiled as one graph, and called without autograd.

    Args:
        function: it depends on nothing but its arguments, and changes none.
        sizes: axes of any size; one that has size 1 keeps it.
        options: of Inductor.
    """

    def __init__(self, function: Callable, sizes: Sizes, options: dict | None = None):
        self.sizes, self.options = sizes, options or {}
        self._known: dict[tuple, Callable] = {}
        # (compiled graph, what it was called with, what it gave), of the last call through torch.compile
        self._last: tuple | None = None
        self._slow = torch.compile(function, fullgraph=True, backend=self._compile)

    def __call__(self, *arguments):
        key = _key(arguments)
        run = self._known.get(key)
        return self._first(key, arguments) if run is None else run(arguments)

    def _first(self, key: tuple, arguments: tuple):
        """The call for shapes that were not seen before."""
        prepared = [self._of_any_size(*pair) for pair in zip(arguments, self.sizes, strict=True)]
        with torch.no_grad():
            result = self._slow(*prepared)
        if self._last is not None:
            direct = _direct(prepared, result, *self._last)
            if len(self._known) >= _MOST_KNOWN:
                self._known.clear()
            if direct is not None:
                self._known[key] = direct
            # it would keep the tensors
            self._last = None
        return result

    @staticmethod
    def _of_any_size(value, axes: tuple[int, ...]):
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        for axis in axes:
            if value.shape[axis] > 1:
                torch._dynamo.maybe_mark_dynamic(value, axis)
        return value

    def _compile(self, graph, examples):
        compiled = torch._dynamo.lookup_backend("inductor")(graph, examples, config_patches=self.options)

        def run(*inputs):
            results = compiled(*inputs)
            self._last = (compiled, inputs, results)
            return results

        return run


def _key(arguments: tuple) -> tuple:
    """All that torch.compile has guards on for such functions: another key may need other code."""
    key: list = [torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()]
    for value in arguments:
        if isinstance(value, Tensor):
            key += (value.shape, value.stride(), value.dtype, value.device)
        else:
            key.append(value)
    return tuple(key)


def _direct(arguments: list, result, compiled: Callable, inputs: tuple, results) -> Callable | None:
    """The call of the compiled graph that these arguments led to; None where it cannot be told from them."""
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    places = {id(value): place for place, value in enumerate(arguments) if isinstance(value, Tensor)}
    wanted = (result,) if isinstance(result, Tensor) else tuple(result)
    found = [id(value) for value in results]
    known = all(id(value) in places if isinstance(value, Tensor) else isinstance(value, int) for value in inputs)
    if len(places) < len(tensors) or not known or not all(id(value) in found for value in wanted):
        return None
    # numbers are the sizes of these very shapes
    taken = tuple((places.get(id(value)), value if isinstance(value, int) else None) for value in inputs)
    given = tuple(found.index(id(value)) for value in wanted)

    def run(arguments: tuple):
        results = compiled(*[number if place is None else arguments[place] for place, number in taken])
        return results[given[0]] if single else tuple([results[place] for place in given])

    single = isinstance(result, Tensor)
    return run


@functools.cache
def part_of(count: int, most: int = 512) -> int:
    """How many numbers to sum at a time of `count`, at most `most`, where a divisor will do; else `count`.

    What is summed stays in a cache. Sums of more than 4096 numbers Inductor makes by pairs, for the sake of their
    rounding errors, and several times slower; those of parts have errors as small.
    """
    part = max(part for part in range(1, min(count, most) + 1) if count % part == 0)
    return part if part >= 16 else count


@functools.cache
def compile_once(
    make: Callable[..., Callable], *arguments, sizes: Sizes, kind: tuple = (), one_loop: bool = True
) -> CompiledFunction:
    """What `make` makes, compiled; each has a code of its own, since torch counts how often one is compiled.

    Args:
        arguments: of `make`; where the first is a tuple, it has the products of each step out.
        sizes: see `CompiledFunction`.
        kind: what else code is compiled anew for.
        one_loop: whether all of it becomes one loop, however much that computes.
    """
    made = make(*arguments)
    products = arguments[0] if arguments and isinstance(arguments[0], tuple) else ()
    # what a profiler shows: the number of steps with it
    name = "_".join([made.__name__, *([str(len(products))] if products else [])])
    code = made.__code__.replace(co_name=name)
    own = types.FunctionType(code, made.__globals__, made.__name__, made.__defaults__, made.__closure__)
    return CompiledFunction(own, sizes, _ONE_LOOP if one_loop else None)
