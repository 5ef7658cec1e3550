"""Work that goes on while the host does other things: on the devices, and of the compiler."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from dpo_jax.allocator import give_back_free_pages

T = TypeVar("T")


@dataclass(frozen=True)
class Begun(Generic[T]):
    """Work that has begun.

    Attributes:
      result: waits for it, and gives what came out.
    """

    result: Callable[[], T]


class Prepared:
    """A compiled function, whose program can be made before it is first called.

    Args:
      fn: what jit or pmap gave.
      whole: whether calls have whole arrays. Where pmap is called with a process's part of them, no program can be made
        ahead: the first call makes it.
    """

    def __init__(self, fn: Any, whole: bool = True) -> None:
        self._fn, self._whole = fn, whole
        self._program: Future[Callable[..., Any]] | None = None

    def prepare(self, *args: Any) -> None:
        """Begins to compile, in a thread, for arguments like these; all calls must have such then."""
        if self._whole and self._program is None:
            pool = ThreadPoolExecutor(1, "compiler")
            self._program = pool.submit(self._compiled, *args)
            pool.shutdown(wait=False)

    def _compiled(self, *args: Any) -> Callable[..., Any]:
        program = self._fn.lower(*args).compile()
        give_back_free_pages()
        return program

    def lower(self, *args: Any) -> Any:
        """The program before it is compiled, for arrays or their shapes."""
        return self._fn.lower(*args)

    def __call__(self, *args: Any) -> Any:
        self.prepare(*args)
        return (self._fn if self._program is None else self._program.result())(*args)
