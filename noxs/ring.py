"""The server's end of a XenStore ring page (docs/misc/xenstore-ring.txt, io/xs_wire.h).

The page is shared memory that outlives this process. ``Ring`` moves bytes and indexes, and
nothing else: whoever owns it decides when received bytes count as consumed, and notifies the
peer's event channel.

The code relies on x86: stores become visible in program order, so data is there before the index
that announces it. A store that a later load must not overtake needs a full barrier; here that is
the system call that notifies the peer, which is why ``Ring`` is always polled again after it.
"""

REQUESTS, RESPONSES, INDEXES = 0, 1024, 2048
SIZE = 1024
PAGE_SIZE = 4096

FEATURE_RECONNECTION = 1
FEATURE_ERROR = 2

CONNECTED, RECONNECT = 0, 1
ERROR_NONE, ERROR_COMM, ERROR_RINGIDX, ERROR_PROTO = 0, 1, 2, 3

_REQ_CONS, _REQ_PROD, _RSP_CONS, _RSP_PROD, _FEATURES, _CONNECTION, _ERROR = range(7)
_U32 = 0xFFFFFFFF


class RingError(Exception):
    """The indexes in the page cannot be: the peer, or another process, corrupted them."""


class Ring:
    """A mapped ring page.

    ``req_cons`` and ``rsp_prod`` are this side's own copies: what the page says about them is
    compared, never believed.
    """

    __slots__ = ("_index", "_requests", "_responses", "req_cons", "rsp_prod")

    def __init__(self, page: memoryview) -> None:
        self._requests = page[REQUESTS : REQUESTS + SIZE]
        self._responses = page[RESPONSES : RESPONSES + SIZE]
        self._index = page[INDEXES : INDEXES + 28].cast("I")
        self.req_cons = self._index[_REQ_CONS]
        self.rsp_prod = self._index[_RSP_PROD]

    @property
    def pristine(self) -> bool:
        """Whether no server has ever used this page."""
        return not (self._index[_REQ_CONS] or self._index[_RSP_PROD] or self._index[_RSP_CONS])

    def received(self) -> bytes:
        """The request bytes that are in the ring. They stay there until ``consume``."""
        cons = self.req_cons
        held = (self._index[_REQ_PROD] - cons) & _U32
        if held > SIZE or self._index[_REQ_CONS] != cons:
            raise RingError(self._describe("request", _REQ_CONS, _REQ_PROD))
        if not held:
            return b""
        start = cons % SIZE
        end = start + held
        if end <= SIZE:
            return bytes(self._requests[start:end])
        return bytes(self._requests[start:]) + bytes(self._requests[: end - SIZE])

    def consume(self, count: int) -> None:
        """Give the space of ``count`` received bytes back to the peer."""
        self.req_cons = (self.req_cons + count) & _U32
        self._index[_REQ_CONS] = self.req_cons

    def send(self, data: bytes | bytearray) -> int:
        """Publish as much of ``data`` as there is room for; the number of bytes."""
        prod = self.rsp_prod
        held = (prod - self._index[_RSP_CONS]) & _U32
        if held > SIZE or self._index[_RSP_PROD] != prod:
            raise RingError(self._describe("response", _RSP_CONS, _RSP_PROD))
        count = min(len(data), SIZE - held)
        if count:
            start = prod % SIZE
            first = min(count, SIZE - start)
            self._responses[start : start + first] = data[:first]
            if first < count:
                self._responses[: count - first] = data[first:count]
            self.rsp_prod = (prod + count) & _U32
            self._index[_RSP_PROD] = self.rsp_prod
        return count

    def advertise(self) -> None:
        """Announce the features that the server has."""
        self._index[_FEATURES] = FEATURE_RECONNECTION | FEATURE_ERROR

    def fail(self, code: int) -> None:
        """Tell the peer why the server no longer listens to it (ERROR_*)."""
        self._index[_ERROR] = code

    @property
    def error(self) -> int:
        """The code given to ``fail``, by this process or one before it."""
        return self._index[_ERROR]

    @property
    def reconnecting(self) -> bool:
        """Whether the peer asks for an empty ring, without its watches and transactions."""
        return self._index[_CONNECTION] == RECONNECT

    def empty(self) -> None:
        """Reset the indexes; the peer must be waiting for ``connected``."""
        for index in (_REQ_CONS, _REQ_PROD, _RSP_CONS, _RSP_PROD, _ERROR):
            self._index[index] = 0
        self.req_cons = self.rsp_prod = 0

    def connected(self) -> None:
        """Let the peer use the ring again."""
        self._index[_CONNECTION] = CONNECTED

    def _describe(self, name: str, cons: int, prod: int) -> str:
        ours = self.req_cons if cons == _REQ_CONS else self.rsp_prod
        return (
            f"{name} ring: consumer {self._index[cons]:#x}, producer {self._index[prod]:#x}, "
            f"expected {ours:#x}"
        )
