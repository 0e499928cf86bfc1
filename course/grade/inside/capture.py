"""Gathers what a cell writes, shows and raises, within a limit of bytes for the whole notebook.

Two roads lead here. Python's own `print` writes into a `Stream`. C code and other programs write to
file descriptors 1 and 2, which are pipes; one thread empties them, so that no writer ever waits for
a reader. A memory file instead of a pipe would need no thread, but grows until memory is full.

What is above the limit is dropped, and one line says so.
"""

import base64
import codecs
import fcntl
import io
import os
import re
import select
import signal
import threading
from contextlib import suppress

SIGNALS = signal.valid_signals()
PIPE_BYTES = 2**20  # the most that Linux grants anybody; a C function may print so much in one go
SETTLE_EVERY = 2**16  # characters that a stream may gather before its progress bars are collapsed
OVERHEAD = 64  # bytes that an output counts besides its content
LONGEST_TRACEBACK = 20_000  # characters
LONGEST_VALUE = 2_000  # characters of an error's message
# What `course/grade/outputs.py` can use; the rest would only eat up the limit.
TEXT_TYPES = ("text/plain", "text/markdown", "text/latex", "text/html")
IMAGE_TYPES = ("image/png", "image/jpeg")


def exact(text, most=None):
    """A plain string of at most so many characters, even from a subclass with tricks."""
    return str.__getitem__(text, slice(0, most))


def words_of(error):
    """An error's type and message, whatever its class does when it is asked for them."""
    try:
        message = exact(str(error), LONGEST_VALUE)
    except BaseException:
        message = "(its message cannot be shown)"
    return exact(type.__getattribute__(type(error), "__name__"), 200), message


class Recorder:
    """The outputs of the running cell, as nbformat writes them; between cells it drops all.

    Its lock lets a thread of the student's, the reader of the pipes and the cell write at once.
    """

    def __init__(self, limit):
        self.limit, self.used, self.is_full, self.is_on = limit, 0, False, False
        self.lock = threading.RLock()
        self.before = lambda: None  # called before anything is added, to keep the order
        self.is_elsewhere = False  # in a worker that the student's code forked
        self._cell, self._clears_next = [], False

    def leave(self):
        """Record no more: this is a fork, and what it records would be lost with it."""
        self.lock, self.before = threading.RLock(), lambda: None
        self.is_on, self.is_elsewhere = False, True

    def begin(self):
        self._cell, self._clears_next, self.is_on = [], False, True

    def end(self):
        """Stop recording and return the cell's outputs."""
        with self.lock:
            self.is_on = False
            self._settle_last()
            outputs, self._cell = self._cell, []
        return [done for output in outputs if (done := _finished(output))]

    def write(self, name, text):
        """Add text to a stream: "stdout" or "stderr"."""
        if self.is_full or not self.is_on or not text:
            return
        with self.lock:
            self._make_room_for_next()
            last = self._cell[-1] if self._cell else None
            if last is None or last.get("name") != name:
                last = {"output_type": "stream", "name": name, "parts": [], "fresh": 0}
                last["size"] = OVERHEAD
                if not self._take(last):
                    return
            last["parts"].append(exact(text, self.limit))
            last["fresh"] += len(text)
            if last["fresh"] > SETTLE_EVERY:
                self._settle(last)

    def show(self, kind, data, metadata, count=None, display_id=None):
        """Add display_data or an execute_result."""
        if self.is_full or not self.is_on:
            return
        output = {"output_type": kind, "data": _usable(data), "metadata": _descriptions(metadata)}
        if count is not None:
            output["execution_count"] = count
        output |= {"display_id": display_id, "size": _size(*output["data"].values())}
        with self.lock:
            self._make_room_for_next()
            self._take(output)

    def update(self, data, metadata, display_id):
        """Replace what this cell showed under the same display_id."""
        if self.is_full or not self.is_on:
            return
        data = _usable(data)
        with self.lock:
            for output in self._cell:
                if display_id is not None and output.get("display_id") == display_id:
                    size = _size(*data.values())
                    self.used += size - output["size"]
                    output |= {"data": data, "metadata": _descriptions(metadata), "size": size}
            if self.used > self.limit:
                self._fill()

    def error(self, kind, value, traceback):
        if self.is_full or not self.is_on:
            return
        name, message = exact(kind.__name__, 200), words_of(value)[1]
        traceback = shortened([exact(str(entry)) for entry in traceback])
        output = {"output_type": "error", "ename": name, "evalue": message, "traceback": traceback}
        output["size"] = _size(message, *traceback)
        with self.lock:
            self._make_room_for_next()
            self._take(output)

    def clear(self, wait):
        if self.is_full or not self.is_on:
            return
        with self.lock:
            self._clears_next = True
            if not wait:
                self._make_room_for_next()

    def _make_room_for_next(self):
        if self._clears_next:
            self.used -= sum(output["size"] for output in self._cell)
            self._cell, self._clears_next = [], False

    def _take(self, output):
        """Add an output if there is room for it, and say whether there was."""
        self._settle_last()
        if not self.is_full and self.used + output["size"] > self.limit:
            self._fill()
        if not self.is_full:
            self.used += output["size"]
            self._cell.append(output)
        return not self.is_full

    def _settle_last(self):
        for last in self._cell[-1:]:
            if last["output_type"] == "stream":
                self._settle(last)

    def _settle(self, stream):
        """Collapse a stream's progress bars, and cut it where the limit is reached."""
        text = collapsed("".join(stream["parts"]))
        raw = text.encode("utf-8", "surrogatepass")
        self.used += OVERHEAD + len(raw) - stream["size"]
        stream |= {"parts": [text], "fresh": 0, "size": OVERHEAD + len(raw)}
        if self.used > self.limit and not self.is_full:
            raw = raw[: max(0, len(raw) - (self.used - self.limit))]
            stream["parts"] = [raw.decode("utf-8", "replace").rstrip("\ufffd")]
            self._fill()

    def _fill(self):
        self.is_full = True
        said = f"output is cut at {_readable(self.limit)}\n"
        line = {"output_type": "stream", "name": "stderr", "parts": [said], "fresh": 0}
        self._cell.append(line | {"size": _size(said)})


def _finished(output):
    """An output without our own book-keeping, or None when it is empty."""
    if output["output_type"] == "stream":
        text = collapsed("".join(output["parts"]), is_over=True)
        return {"output_type": "stream", "name": output["name"], "text": text} if text else None
    return {key: value for key, value in output.items() if key not in ("size", "display_id")}


def _readable(count):
    for unit, size in (("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:g} {unit}"
    return f"{count} bytes"


def _size(*texts):
    return OVERHEAD + sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)


def _usable(data):
    """The parts of a mime bundle that a feedback page can show, images in base64."""
    kept = {}
    for kind in (*TEXT_TYPES, *IMAGE_TYPES):
        value = data.get(kind)
        if isinstance(value, bytes):
            value = base64.b64encode(value).decode("ascii")
        if isinstance(value, str):
            kept[kind] = exact(value)
    if any(kind in kept for kind in IMAGE_TYPES):
        kept.pop("text/html", None)  # the course's figures carry their PNG a second time in it
    return kept


def _descriptions(metadata):
    """The alternative texts of images: all of the metadata that is used."""
    kept = {}
    for kind in IMAGE_TYPES:
        about = metadata.get(kind) if isinstance(metadata, dict) else None
        if isinstance(about, dict) and isinstance(about.get("alt"), str):
            kept[kind] = {"alt": exact(about["alt"], LONGEST_VALUE)}
    return kept


def shortened(traceback):
    """A traceback of bounded length: its beginning, and more of its end, where the error is."""
    if sum(map(len, traceback)) + len(traceback) <= LONGEST_TRACEBACK:
        return traceback
    text = "\n".join(traceback)
    head, tail = text[: LONGEST_TRACEBACK // 4], text[-3 * LONGEST_TRACEBACK // 4 :]
    # Lines are kept whole where they are short, so that no colour code is cut in two.
    head = head.rpartition("\n")[0] or head
    tail = tail.partition("\n")[2] or tail
    return [*head.split("\n"), "\x1b[0m[... the middle is left out ...]", *tail.split("\n")]


# Progress bars


def _line_as_on_a_terminal(line):
    """The characters that a terminal shows after this line, and the place of its cursor."""
    if "\r" not in line and "\b" not in line:
        return line, len(line)
    shown, at = [], 0
    for token in re.split("([\r\b])", line):
        if token == "\r":
            at = 0
        elif token == "\b":
            at = max(0, at - 1)
        else:
            shown[at : at + len(token)] = token
            at += len(token)
    return "".join(shown), at


def collapsed(text, is_over=False):
    """The text with each line as a terminal shows it; the last may be continued if not over."""
    if "\r" not in text and "\b" not in text:
        return text
    *finished, last = text.split("\n")
    lines = [_line_as_on_a_terminal(line)[0] for line in finished]
    shown, at = _line_as_on_a_terminal(last)
    if not is_over and at < len(shown):
        shown += "\r" + shown[:at]  # the cursor stands where it stood
    return "\n".join([*lines, shown])


# The two roads


class Stream(io.TextIOBase):
    """What sys.stdout and sys.stderr are in a cell."""

    encoding, errors = "UTF-8", None

    def __init__(self, name, descriptor, recorder):
        self.name, self._descriptor, self._recorder = name, descriptor, recorder

    def write(self, text):
        if not isinstance(text, str):
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        recorder = self._recorder
        if recorder.is_elsewhere:
            rest = text.encode("utf-8", "replace")
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        elif recorder.is_on and not recorder.is_full:
            recorder.before()
            recorder.write(self.name, text)
        return len(text)

    def fileno(self):
        return self._descriptor

    def isatty(self):
        return False

    def writable(self):
        return True

    def close(self):
        """Stay open: a notebook's streams outlive a cell that closes them."""


class Pipes:
    """Turns descriptors 1 and 2 of this process into pipes that end in the recorder."""

    def __init__(self, recorder):
        self._recorder, self._readers = recorder, {}
        for name, descriptor in (("stdout", 1), ("stderr", 2)):
            reader, writer = os.pipe()
            # Out of the way: students' code counts on nothing, but prints what it opens.
            high = fcntl.fcntl(reader, fcntl.F_DUPFD_CLOEXEC, 200)
            os.close(reader)
            with suppress(OSError, AttributeError):  # many pipes get less; macOS has no such call
                fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
            os.set_blocking(high, False)
            os.dup2(writer, descriptor)
            os.close(writer)
            decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
            self._readers[high] = name, decoder
        self._waiting = self._poll()
        os.register_at_fork(after_in_child=recorder.leave)
        # No signal goes to this thread: an interrupt must reach the sleep of the main one.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        size = threading.stack_size(2**18)  # the usual 8 MiB would count as the student's memory
        try:
            threading.Thread(target=self._empty_for_ever, name="outputs", daemon=True).start()
        finally:
            threading.stack_size(size)
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def _poll(self):
        poll = select.poll()
        for reader in self._readers:
            poll.register(reader, select.POLLIN)
        return poll

    def drain(self, most=2**22):
        """Take what waits in the pipes, unless a flood comes in faster than it is read."""
        with self._recorder.lock:
            if not self._waiting.poll(0):
                return
            for reader, (name, decoder) in self._readers.items():
                taken = 0
                while taken < most:
                    try:
                        chunk = os.read(reader, PIPE_BYTES)
                    except OSError:  # it is empty, or the student's code closed it
                        break
                    if not chunk:
                        break
                    taken += len(chunk)
                    if not self._recorder.is_full:
                        self._recorder.write(name, decoder.decode(chunk))

    def _empty_for_ever(self):
        poll = self._poll()
        while True:
            for reader, event in poll.poll():
                if not event & select.POLLIN:  # all writers are closed: the end would come for ever
                    poll.unregister(reader)
            self.drain()
