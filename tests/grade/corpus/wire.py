"""Forged frames: what a process says that has taken over its own end of the wire.

The student's code shares its process with the loop that answers for it, and can change all of it.
So each case here breaks one rule of the protocol while `softmax` is being answered, and only then:
what it costs is that answer, and the other exercise keeps its points.
"""

from .kit import FULL, ONLY_MEAN, UNUSABLE, collector

CASES, case = collector("forgery: the wire")
BROKEN = r"^its process (sent|answered)|^it ended|^its process ended"
LATE = r"^it ran (longer|out of time)"

# `forge` gets the next reply to a call of softmax, and returns what is sent in its place. The
# printed word proves that the loop was found, and that the case attacks what it means to.
MEDDLE = """
import socket, struct, sys, time
wire = next(m for name, m in list(sys.modules.items()) if name.endswith("inside.wire"))
armed = []
true_send = wire.Connection.send

def send(connection, message, buffers=()):
    if armed:
        armed.clear()
        forged = forge(connection, dict(message), list(buffers))
        if forged is None:
            return
        message, buffers = forged
    true_send(connection, message, buffers)

wire.Connection.send = send

def raw(connection, data):
    connection.sock.setblocking(True)
    connection.sock.sendall(data)
    connection.sock.setblocking(False)

def frame(header, body=b""):
    return struct.pack("<IQ", len(header), len(body)) + header + body

print("meddling")
"""
ARMED = """
def softmax(scores):
    armed.append(True)
    return scores
"""


def meddles(kit, forge: str) -> bytes:
    lines = "\n".join(f"    {line}" for line in forge.strip().split("\n"))
    first = f"{MEDDLE}\ndef forge(connection, message, buffers):\n{lines}\n"
    return kit.hand_in(first=first, softmax=ARMED)


def forged(name: str, forge: str, reason: str = BROKEN) -> None:
    """Add the case of one forged reply."""

    def build(kit) -> bytes:
        return meddles(kit, forge)

    build.__name__ = name
    case(ONLY_MEAN, reason, shown="meddling")(build)


def says(**reply) -> str:
    """Send these entries in place of those of the true reply."""
    return f"return message | {reply!r}, buffers"


def value(shown: object) -> str:
    """Send another value, with sixteen bytes that it may point at."""
    return f"return {{'id': message['id'], 'value': {shown!r}}}, [bytes(16)]"


# Out of turn

forged("a_reply_to_another_request", "return message | {'id': message['id'] + 1}, buffers")
forged("a_reply_to_the_last_request", "return message | {'id': message['id'] - 1}, buffers")
forged("a_reply_without_a_number", "message.pop('id')\nreturn message, buffers")
forged("a_reply_whose_number_is_a_truth", says(id=True))
forged("a_reply_whose_number_is_a_list", says(id=[1]))
forged(
    "two_replies",
    "true_send(connection, message, buffers)\nreturn message, buffers",
    rf"{BROKEN}|{UNUSABLE}",
)
forged(
    "a_reply_to_the_next_request_in_advance",
    "true_send(connection, message, buffers)\nreturn message | {'id': message['id'] + 1}, buffers",
    rf"{BROKEN}|{UNUSABLE}",
)
forged(
    "a_reply_to_everything_to_come",
    'for n in range(1000):\n    raw(connection, frame(b\'{"id":%d,"value":true}\' % n))',
)
forged("no_reply", "pass", LATE)
forged("half_a_reply", "raw(connection, frame(b'{\"id\":1}')[:-3])", LATE)
forged(
    "a_reply_in_drips",
    "for _ in range(120):\n    raw(connection, b'\\x01')\n    time.sleep(0.25)",
    rf"{LATE}|{BROKEN}",
)
forged("a_closed_line", "connection.sock.shutdown(socket.SHUT_RDWR)")

# Lengths and JSON

forged(
    "a_header_of_four_gigabytes", "raw(connection, struct.pack('<IQ', 2**32 - 1, 0) + b' ' * 1000)"
)
forged("a_body_of_exabytes", "raw(connection, struct.pack('<IQ', 2, 2**63) + b'{}')")
forged("a_header_of_noise", "raw(connection, frame(bytes(range(256)) * 4))")
forged("a_header_that_is_a_list", "raw(connection, frame(b'[1, 2, 3]'))")
forged("a_header_that_is_a_number", "raw(connection, frame(b'1'))")
forged("a_header_nested_deeply", "raw(connection, frame(b'[' * 1_000_000 + b']' * 1_000_000))")
forged(
    "a_number_of_a_million_digits_in_the_header",
    "raw(connection, frame(b'{\"id\":' + b'9' * 1_000_000 + b'}'))",
)
forged("a_header_with_nan", 'raw(connection, frame(b\'{"id":NaN,"value":Infinity}\'))')
forged(
    "a_header_with_everything_twice",
    "n = message['id']\n"
    'raw(connection, frame(b\'{"id":0,"id":%d,"value":1,"value":{},"value":"x"}\' % n))',
    rf"{BROKEN}|{UNUSABLE}",
)
forged(
    "a_value_of_a_million_parts",
    "start = b'{\"id\":%d,\"value\":[' % message['id']\n"
    "raw(connection, frame(start + b'1,' * 1_500_000 + b'1]}'))",
)

# Values

forged("a_tensor_of_negative_shape", value({"tensor": ["float32", [-2, -2], [0, 16]]}))
forged("a_tensor_of_overflowing_shape", value({"tensor": ["float32", [2**31, 2**31, 4], [0, 16]]}))
forged("a_tensor_of_overflowing_product", value({"tensor": ["uint8", [2**39] * 40, [0, 16]]}))
forged("a_tensor_of_true_axes", value({"tensor": ["float32", [True, 4], [0, 16]]}))
forged("a_tensor_with_too_few_bytes", value({"tensor": ["float64", [2, 2], [0, 16]]}))
forged("a_tensor_beyond_the_body", value({"tensor": ["float32", [2, 2], [8, 16]]}))
forged("a_tensor_before_the_body", value({"tensor": ["float32", [2, 2], [-8, 16]]}))
forged("a_tensor_of_objects", value({"tensor": ["object", [2], [0, 16]]}))
forged("a_tensor_with_axes_twice", value({"tensor": ["float32", [2, 2], [0, 16], [0, 0]]}))
forged("tensors_that_share_bytes", value([{"tensor": ["float32", [2, 2], [0, 16]]}] * 2))
forged("an_array_of_objects", value({"array": ["object", [2], [0, 16]]}))
forged("an_unknown_tag", value({"__class__": "list"}))
forged("a_tag_that_names_a_method", value({"unpack": 1}))
forged("two_tags", value({"float": "nan", "int": "0x1"}))
forged("a_pickle", value({"pickle": [[0, 16], []]}))
forged("a_set_of_lists", value({"set": [[1], [2]]}))
forged("a_dictionary_with_odd_keys", value({"dict": [[[1], 2], [{"dict": []}, 3]]}))
forged("a_named_tuple_called_import", value({"named": ["__import__", ["import"], [1]]}))
forged(
    "text_that_is_no_text",
    "return {'id': message['id'], 'value': {'str': [0, 4]}}, [b'\\xff\\xfe\\xfd\\xfc']",
)
forged("a_number_of_many_hexadecimal_digits", value({"int": "0x" + "f" * 300}))
forged("an_argument_that_was_never_given", value({"given": 99}))
forged("an_argument_before_the_first", value({"given": -1}))
forged("a_handle_that_nobody_has", value({"tracked": 10**9}))
forged("a_handle_of_an_odd_kind", value({"object": [10**9, {"kind": ["a"]}]}))

# Claims about what the call did

forged("a_change_of_an_argument_never_given", says(changed=[[99, 1]]))
forged(
    "a_change_to_another_shape",
    "return message | {'changed': [[0, {'tensor': ['float32', [4], [0, 16]]}]]}, [bytes(64)]",
)
forged("a_change_to_another_kind", says(changed=[[0, [1, 2, 3]]]))
forged("changes_that_are_no_list", says(changed={"0": 1}))
forged("gradients_nobody_asked_for", says(grads=[[0, True, ["float32", [2, 2], [0, 16]]]]))
forged("state_of_no_module", says(state={"modules": [[77, {"type": ["a", "b"]}]], "tensors": []}))
forged("state_that_is_no_state", says(state=[1, 2, 3]))
forged("a_graph_that_is_none", says(graph=["a", 3]))
forged("a_graph_of_odd_outputs", says(graph=[10**9, [["float32", [-1], [0, 4]]]]))

# Errors

forged("an_error_that_is_no_error", says(error=1), rf"{BROKEN}|{UNUSABLE}|^the answer raised")
forged(
    "an_error_that_is_an_exit",
    says(error=["SystemExit", ["SystemExit", "BaseException"], "0"]),
    rf"{BROKEN}|^the answer raised",
)
forged(
    "an_error_that_is_the_graders",
    says(error=["Lost", ["Lost", "KeyboardInterrupt"], "passed"]),
    rf"{BROKEN}|^the answer raised",
)
forged(
    "an_error_with_a_list_for_a_name",
    says(error=[["x"], {"a": 1}, None]),
    rf"{BROKEN}|^the answer raised",
)
forged("a_reply_with_nothing_in_it", "return {'id': message['id']}, []")


@case(ONLY_MEAN, rf"{BROKEN}|{UNUSABLE}")
def speaks_before_it_is_asked(kit):
    """A thread writes to every socket that the process has, all the time that softmax runs."""
    return kit.hand_in(
        softmax="""
        import os
        import stat
        import threading
        import time

        sockets = []
        for number in range(64):
            try:
                if stat.S_ISSOCK(os.fstat(number).st_mode):
                    sockets.append(number)
            except OSError:
                pass

        def shout():
            until = time.monotonic() + 30
            while time.monotonic() < until:
                for number in sockets:
                    try:
                        os.write(number, b'\\x08\\0\\0\\0' + b'\\0' * 8 + b'{"id":1}')
                    except OSError:
                        return
                time.sleep(0.01)

        def softmax(scores):
            threading.Thread(target=shout, daemon=True).start()
            time.sleep(0.2)
            return scores
        """
    )


@case(FULL)
def speaks_from_a_cell(kit):
    """A cell writes to every socket and descriptor that it has; the cell is lost, no answer is."""
    return kit.hand_in(
        first="""
        import os
        for number in range(3, 64):
            try:
                os.write(number, b"\\xff" * 4096)
            except OSError:
                pass
        """
    )


@case(FULL)
def closes_every_descriptor(kit):
    return kit.hand_in(between="import os\nos.closerange(0, 1024)")


@case(ONLY_MEAN, rf"{BROKEN}|{LATE}|^its process|{UNUSABLE}")
def reads_the_requests_away(kit):
    """A thread takes what the grader says next from the socket, before the loop can."""
    return kit.hand_in(
        softmax="""
        import os
        import stat
        import threading

        def listen():
            for number in range(64):
                try:
                    if stat.S_ISSOCK(os.fstat(number).st_mode):
                        os.set_blocking(number, True)
                        os.read(number, 2**16)
                except OSError:
                    pass

        def softmax(scores):
            threading.Thread(target=listen, daemon=True).start()
            return scores
        """
    )


@case(ONLY_MEAN, rf"{BROKEN}|{UNUSABLE}|^the answer raised", shown="meddling")
def replaces_the_loop(kit):
    """Whatever softmax gives, the loop answers True."""
    return kit.hand_in(
        softmax="""
        import sys

        serve = next(m for name, m in list(sys.modules.items()) if name.endswith("inside.serve"))
        true = serve.Server.answer
        armed = []

        def answer(server, message, body):
            reply = true(server, message, body)
            if not armed:
                return reply
            armed.clear()
            return {"id": message["id"], "value": True}, []

        serve.Server.answer = answer
        print("meddling")

        def softmax(scores):
            armed.append(True)
            return scores
        """
    )


@case(ONLY_MEAN, rf"{BROKEN}|{UNUSABLE}|^the answer raised", shown="meddling")
def swaps_what_was_kept(kit):
    """The names that its loop remembers are exchanged after the last cell has run."""
    return kit.hand_in(
        softmax="def softmax(scores):\n    return scores",
        last="""
        import gc
        import sys

        serve = next(m for name, m in list(sys.modules.items()) if name.endswith("inside.serve"))
        for server in [thing for thing in gc.get_objects() if type(thing) is serve.Server]:
            server.kept["softmax"] = {"softmax": lambda scores: scores.argmax(), "expect": print}
            server.kept["why_max"] = {"why_max": print}
            print("meddling")
        """,
    )
