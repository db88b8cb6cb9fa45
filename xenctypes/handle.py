"""What every library handle has in common, and the memory mapped through one.

A handle owns what was made with it. Closing it first closes that, the newest
first, because the libraries use the handle to do so; an error path that only
closes the outermost handle therefore leaks nothing.
"""

from __future__ import annotations

from ctypes import c_ubyte, sizeof

from xenctypes.errors import CallFailed
from xenctypes.toollog import ToolLog

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Self

    from xenctypes.signatures import Opaque

# mmap(2)
PROT_NONE = 0
PROT_READ = 1
PROT_WRITE = 2
PROT_EXEC = 4

EINVAL, EBADF = 22, 9


class Resource:
    """Something to release exactly once: a context manager with ``close()``."""

    def __init__(self, owner: Resource | None = None) -> None:
        self._open = True
        self._owned: dict[Resource, None] = {}
        self._owner = owner
        if owner is not None:
            owner.adopt(self)

    def adopt(self, owned: Resource) -> None:
        """Close ``owned`` when this is closed."""
        self._owned[owned] = None

    def disown(self, owned: Resource) -> None:
        """``owned`` was closed on its own."""
        self._owned.pop(owned, None)

    @property
    def closed(self) -> bool:
        """Whether ``close()`` was called."""
        return not self._open

    def close(self) -> None:
        """Release it, after all that was made with it. Idempotent.

        It counts as released even if the library reports a failure, which is
        raised as CallFailed once everything else is done.
        """
        if not self._open:
            return
        self._open = False
        failure: CallFailed | None = None
        for owned in reversed(list(self._owned)):
            try:
                owned.close()
            except CallFailed as error:
                failure = failure or error
        try:
            self._release()
        except CallFailed as error:
            failure = failure or error
        finally:
            if self._owner is not None:
                self._owner.disown(self)
        if failure is not None:
            raise failure

    def _release(self) -> None:
        raise NotImplementedError

    def forget(self) -> None:
        """Release what nobody can reach any more, short of pulling memory away."""
        self._open = False
        for owned in reversed(list(self._owned)):
            owned.forget()

    def _check_open(self, what: str) -> None:
        if not self._open:
            raise CallFailed(what, EBADF, f"{type(self).__name__} is closed")

    def __enter__(self) -> Self:
        self._check_open(type(self).__name__)
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Handle(Resource):
    """A library's handle. ``raw`` is the C pointer, ``log`` what it has to say."""

    def __init__(
        self,
        open_raw: Callable[[ToolLog], Opaque],
        close_raw: Callable[[Opaque], object] | None,
        *,
        owner: Resource | None = None,
        log: ToolLog | None = None,
    ) -> None:
        self._open = False
        self._own_log = log is None
        self.log = ToolLog() if log is None else log
        self._close_raw = close_raw
        try:
            self._raw = open_raw(self.log)
        except BaseException:
            self._close_log()
            raise
        self._raw.log = self.log
        super().__init__(owner)

    @property
    def raw(self) -> Opaque:
        """The C handle. Raises CallFailed (EBADF) once closed."""
        if not self._open:
            raise CallFailed(type(self).__name__, EBADF, "used after close()")
        return self._raw

    def _release(self) -> None:
        try:
            if self._close_raw is not None:
                self._close_raw(self._raw)
        finally:
            self._close_log()

    def _close_log(self) -> None:
        if self._own_log:
            self.log.close()

    def forget(self) -> None:
        """See ``Resource.forget``. Idempotent: owner and owned may both be collected."""
        if not self._open:
            return
        super().forget()
        try:
            self._release()
        except CallFailed:
            return  # A finaliser has nobody to tell.

    def __del__(self) -> None:
        if getattr(self, "_open", False):
            self.forget()


class Mapping(Resource):
    """Pages mapped into this process; unmapped by ``close()``.

    ``address`` is where, ``length`` how many bytes. Nothing made from ``view``
    or ``overlay()`` may be used after ``close()``: the memory is gone, and the
    process would die. For the same reason a mapping that is merely forgotten
    stays until its handle is closed, or for ever if that is forgotten too.
    """

    def __init__(
        self,
        owner: Resource,
        address: int,
        length: int,
        prot: int,
        unmap: Callable[[], object],
    ) -> None:
        super().__init__(owner)
        self.address = address
        self.length = length
        self.prot = prot
        self._unmap = unmap
        self._view: memoryview | None = None

    @property
    def view(self) -> memoryview:
        """The bytes, writable if mapped with PROT_WRITE. Invalid after ``close()``."""
        self._check_open("view")
        if self._view is None:
            memory: Any = (c_ubyte * self.length).from_address(self.address)
            view = memoryview(memory).cast("B")
            self._view = view if self.prot & PROT_WRITE else view.toreadonly()
        return self._view

    def overlay(self, kind: Any, offset: int = 0) -> Any:
        """A ctypes object of type ``kind`` laid over the bytes at ``offset``."""
        self._check_open("overlay")
        if offset < 0 or offset + sizeof(kind) > self.length:
            raise CallFailed(
                "overlay", EINVAL, f"{sizeof(kind)} bytes at {offset} of {self.length}"
            )
        return kind.from_address(self.address + offset)

    def __len__(self) -> int:
        return self.length

    def _release(self) -> None:
        if self._view is not None:
            try:
                self._view.release()
            except BufferError:
                # Somebody still holds a view made of it, against the warning
                # above; on an error path the pages have to go all the same.
                self._view = None
        self._unmap()
