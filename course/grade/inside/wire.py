"""The wire between the grader and a student's process: one request, one reply, over a socket.

A frame is two lengths, a JSON header, and a body of raw bytes that the header points into. Each
side reads exactly one frame at a time. Whatever the other side does instead (it ends, it is late,
it speaks before it is asked, it claims lengths that are too large) becomes one error, `Lost`, after
which the connection is of no more use. What header and body mean is said in `values.py`.
"""

import json
import select
import socket
import struct
import time
from collections.abc import Callable, Iterable

LARGEST_HEADER = 4 * 2**20  # text that is longer travels in the body, so headers stay small
_LENGTHS = struct.Struct("<IQ")
_READ = 2**16
_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False, check_circular=False).encode


class Lost(BaseException):
    """The other process can no longer be spoken to.

    Not an `Exception`: a check that catches what an answer raises must not catch this.
    `how` is "ended" (its end of the socket is closed), "late" (the deadline has passed) or "broken"
    (it did not keep to the protocol); `sentence` completes "no points because ...".
    """

    def __init__(self, how: str, sentence: str) -> None:
        super().__init__(sentence)
        self.how, self.sentence = how, sentence


def ended() -> Lost:
    return Lost("ended", "its process ended")


def late() -> Lost:
    return Lost("late", "it ran out of time")


def out_of_turn() -> Lost:
    return Lost("broken", "its process answered out of turn")


def malformed(what: str = "a damaged message") -> Lost:
    return Lost("broken", f"its process sent {what}")


class Connection:
    """One end of a stream socket. Past `deadline`, a `time.monotonic()`, nothing is waited for."""

    def __init__(self, sock: socket.socket, largest: int = 64 * 2**20) -> None:
        sock.setblocking(False)
        self.sock, self.largest = sock, largest
        self.deadline: float | None = None
        # Asked when the deadline has passed: it may do something about it and give another one.
        self.when_late: Callable[[], float | None] = lambda: None
        self.received = 0  # bytes
        self._received = bytearray(_READ)
        self._poll = select.poll()

    def send(self, message: dict, buffers: Iterable[bytes] = ()) -> None:
        """Send one frame.

        Raises: Lost, also if there is something to read, since nothing is due; OverflowError,
        before anything was sent, if the other side would refuse the frame.
        """
        header, body = _encode(message).encode("ascii"), b"".join(buffers)
        if len(header) > LARGEST_HEADER or len(body) > self.largest:
            raise OverflowError("the values are too many or too large for one message")
        self._nothing_is_due()
        frame = memoryview(_LENGTHS.pack(len(header), len(body)) + header + body)
        while frame:
            try:
                sent = self.sock.send(frame)
            except (BlockingIOError, InterruptedError):
                self._wait(select.POLLOUT)
                continue
            except OSError as error:
                raise ended() from error
            frame = frame[sent:]

    def receive(self) -> tuple[dict, memoryview]:
        """The next frame: its header, and its body, which can be written to.

        Raises: Lost, also when more than one frame has arrived.
        """
        filled = self._read_into(memoryview(self._received), _LENGTHS.size)
        header_length, body_length = _LENGTHS.unpack_from(self._received)
        if header_length > LARGEST_HEADER or body_length > self.largest:
            raise malformed(f"more than {self.largest >> 20} MiB at once")
        total = _LENGTHS.size + header_length + body_length
        self.received += total
        if filled > total:
            raise out_of_turn()
        frame = memoryview(bytearray(total))
        frame[:filled] = self._received[:filled]
        if filled < total:
            self._read_into(frame[filled:], total - filled)
        start = _LENGTHS.size + header_length
        return _decode(frame[_LENGTHS.size : start]), frame[start:]

    def close(self) -> None:
        self.sock.close()

    def _nothing_is_due(self):
        try:
            early = self.sock.recv(1, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            raise ended() from error
        raise out_of_turn() if early else ended()

    def _read_into(self, view, wanted):
        """Fill the view with `wanted` bytes, or with what comes along with the last of them."""
        filled = 0
        while filled < wanted:
            self._wait(select.POLLIN)
            try:
                count = self.sock.recv_into(view[filled:])
            except (BlockingIOError, InterruptedError):
                continue
            except OSError as error:
                raise ended() from error
            if not count:
                raise ended()
            filled += count
        return filled

    def _wait(self, event):
        self._poll.register(self.sock, event)
        while True:
            if self.deadline is None:
                self._poll.poll()
                return
            left = self.deadline - time.monotonic()
            if left > 0 and self._poll.poll(left * 1000):
                return
            more = self.when_late()
            if more is None:
                raise late()
            self.deadline = more


def _decode(header):
    try:
        message = _decoder.decode(str(header, "ascii"))
    except (ValueError, RecursionError) as error:
        raise malformed() from error
    if type(message) is not dict:
        raise malformed()
    return message


def _no_constant(name):
    raise ValueError(f"{name} is not JSON")


_decoder = json.JSONDecoder(parse_constant=_no_constant)
