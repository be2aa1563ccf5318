"""Loops over vectors, in LLVM's own words: what no compiler would make of a loop by itself.

Knows addresses and registers. Knows nothing of what is computed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llvmlite import binding, ir
from numba.core.cgutils import get_or_insert_function

FEATURES = binding.get_host_cpu_features()
LANES = 16
SUM_FLAGS = ("reassoc", "contract", "nsz")
LONG, WORD = ir.IntType(64), ir.IntType(32)
WORDS = ir.VectorType(WORD, LANES)
FLOATS = ir.VectorType(ir.FloatType(), LANES)


@dataclass(frozen=True, slots=True)
class Builder:
    """The few words that such loops are made of."""

    ir: Any

    def load(self, address: Any, offset: Any, kind: Any) -> Any:
        place = self.ir.inttoptr(self.ir.add(address, offset), kind.as_pointer())
        # Of any alignment.
        return self.ir.load(place, align=1, typ=kind)

    def prefetch(self, address: Any, offset: Any) -> None:
        """To read, into the second level; an address that is nobody's is no fault.

        The first level can wait for a few lines only: while it does, nothing is computed.
        """
        place = self.ir.inttoptr(self.ir.add(address, offset), ir.IntType(8).as_pointer())
        self.call("llvm.prefetch.p0i8", ir.VoidType(), place, WORD(0), WORD(2), WORD(1))

    def times(self, number: Any, factor: int) -> Any:
        return self.ir.mul(number, LONG(factor))

    def starts(self, address: Any, stride: Any, num: int) -> list[Any]:
        return [self.ir.add(address, self.times(stride, i)) for i in range(num)]

    def floats(self, codes: Any) -> Any:
        return self.ir.sitofp(codes, FLOATS)

    def added(self, total: Any, a: Any, b: Any) -> Any:
        return self.ir.fadd(total, self.ir.fmul(a, b, flags=SUM_FLAGS), flags=SUM_FLAGS)

    def fma(self, a: Any, b: Any, total: Any) -> Any:
        """a · b + total, rounded once."""
        return self.call(f"llvm.fma.v{a.type.count}f32", a.type, a, b, total)

    def outer(
        self, sums: list[Any], factors: list[Any], loads: Sequence[Callable[[], Any]]
    ) -> list[Any]:
        """sums[r, v] + factors[r] · the vector that loads[v] gives.

        One vector at a time: beside the sums and factors, registers have room for no more.
        """
        results = list(sums)
        for v, load in enumerate(loads):
            vector = load()
            for r, factor in enumerate(factors):
                i = r * len(loads) + v
                results[i] = self.fma(factor, vector, results[i])
        return results

    def for_number(self, number: Any, most: int, put: Callable[[int], None]) -> None:
        """What `put` makes of the number that it is, from 1 to `most`."""
        after = self.ir.append_basic_block("number.end")
        choice = self.ir.switch(number, after)
        for num in range(1, most + 1):
            choice.add_case(LONG(num), self.ir.append_basic_block("number"))
            self.ir.position_at_end(choice.cases[-1][1])
            put(num)
            self.ir.branch(after)
        self.ir.position_at_end(after)

    def kept(self, vector: Any) -> Any:
        """The same, in a register at this point: nothing is reordered across it."""
        kind = ir.FunctionType(vector.type, [vector.type])
        return self.ir.asm(kind, "", "=x,0", [vector], side_effect=False)

    def spread(self, number: Any, kind: Any = FLOATS) -> Any:
        one = self.ir.insert_element(ir.Constant(kind, ir.Undefined), number, WORD(0))
        mask = ir.Constant(ir.VectorType(WORD, kind.count), [0] * kind.count)
        return self.ir.shuffle_vector(one, ir.Constant(kind, ir.Undefined), mask)

    def joined(self, vector: Any, join: Callable[[Any, Any], Any]) -> Any:
        """One number of all that the vector has, by halves."""
        size = vector.type.count
        while size > 1:
            size //= 2
            parts = [
                self.ir.shuffle_vector(
                    vector,
                    ir.Constant(vector.type, ir.Undefined),
                    ir.Constant(ir.VectorType(WORD, size), list(range(first, first + size))),
                )
                for first in (0, size)
            ]
            vector = join(*parts)
        return self.ir.extract_element(vector, WORD(0))

    def larger(self, a: Any, b: Any) -> Any:
        return self.ir.select(self.ir.fcmp_ordered(">", a, b), a, b)

    def larger_integer(self, a: Any, b: Any) -> Any:
        return self.ir.select(self.ir.icmp_signed(">", a, b), a, b)

    def call(self, name: str, result: Any, *arguments: Any) -> Any:
        """One of LLVM's own functions."""
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        function = get_or_insert_function(self.ir.module, kind, name)
        return self.ir.call(function, arguments)

    def store(self, number: Any, address: Any) -> None:
        place = self.ir.inttoptr(address, number.type.as_pointer())
        self.ir.store(number, place, align=1)

    def sums(
        self,
        num: int,
        count: Any,
        add: Callable[[Any, list[Any]], list[Any]],
        *,
        kind: Any = FLOATS,
    ) -> list[Any]:
        """What `add(i, sums)` ends with, for i below `count`, which is at least 1."""
        is_vector = isinstance(kind, ir.VectorType)
        zero = ir.Constant(kind, [kind.element(0)] * kind.count if is_vector else 0)
        before = self.ir.block
        body = self.ir.append_basic_block("sums")
        after = self.ir.append_basic_block("sums.end")
        self.ir.branch(body)
        self.ir.position_at_end(body)
        index = self.ir.phi(LONG)
        sums = [self.ir.phi(kind) for _ in range(num)]
        results = add(index, sums)
        # `add` may have loops of its own.
        end = self.ir.block
        following = self.ir.add(index, LONG(1))
        firsts = [LONG(0), *[zero] * num]
        for phi, first, result in zip([index, *sums], firsts, [following, *results], strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(result, end)
        self.ir.cbranch(self.ir.icmp_signed("<", following, count), body, after)
        self.ir.position_at_end(after)
        return results
