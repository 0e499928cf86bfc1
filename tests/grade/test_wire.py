"""What a hostile process may send: every frame and value here was made by hand, not by a Packer."""

import json
import math
import socket
import struct
import threading
import time

import pytest
import torch

from course.grade.inside.values import (
    MOST_NODES,
    CannotTravel,
    Packer,
    Unpacker,
    fields_of,
    same_bytes,
)
from course.grade.inside.wire import LARGEST_HEADER, Connection, Lost


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    connection = Connection(ours, largest=2**20)
    connection.deadline = time.monotonic() + 5
    yield connection, theirs
    ours.close()
    theirs.close()


def frame(header, body=b""):
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    return struct.pack("<IQ", len(header), len(body)) + header + body


def broken(call):
    with pytest.raises(Lost) as caught:
        call()
    assert caught.value.how == "broken"
    return caught.value.sentence


# Frames


def test_a_frame_arrives_whole_however_it_is_cut(pair):
    connection, theirs = pair
    body = bytes(range(256)) * 2000
    whole = frame({"a": [1, "\ud800"]}, body)

    def drip():
        for start in (0, 5, 13, 300):
            end = {0: 5, 5: 13, 13: 300, 300: len(whole)}[start]
            theirs.sendall(whole[start:end])
            time.sleep(0.01)

    thread = threading.Thread(target=drip)
    thread.start()
    message, received = connection.receive()
    thread.join()
    assert message == {"a": [1, "\ud800"]}
    assert bytes(received) == body
    assert connection.received == len(whole)


def test_both_ends_understand_each_other(pair):
    connection, theirs = pair
    other = Connection(theirs)
    connection.send({"x": 1.5}, [b"ab", b"", b"c"])
    message, body = other.receive()
    assert message == {"x": 1.5}
    assert bytes(body) == b"abc"
    body[0] = 0  # it can be written to


def test_a_closed_end_is_an_ended_process(pair):
    connection, theirs = pair
    theirs.sendall(frame({}, b"x" * 100)[:50])
    theirs.close()
    with pytest.raises(Lost, match="its process ended") as caught:
        connection.receive()
    assert caught.value.how == "ended"
    with pytest.raises(Lost, match="its process ended"):
        connection.send({})


def test_the_deadline_is_for_the_whole_frame_even_if_bytes_keep_dripping(pair):
    connection, theirs = pair
    connection.deadline = time.monotonic() + 0.3
    stop = threading.Event()

    def drip():
        for byte in frame({"a": "x" * 5000}):
            if stop.wait(0.02):
                return
            theirs.sendall(bytes([byte]))

    thread = threading.Thread(target=drip)
    thread.start()
    started = time.monotonic()
    with pytest.raises(Lost) as caught:
        connection.receive()
    stop.set()
    thread.join()
    assert caught.value.how == "late"
    assert time.monotonic() - started < 2


def test_a_process_that_does_not_read_is_late(pair):
    connection, _ = pair
    connection.deadline, connection.largest = time.monotonic() + 0.2, 2**26
    with pytest.raises(Lost) as caught:
        connection.send({}, [b"x" * 2**25])
    assert caught.value.how == "late"


def test_more_time_can_be_given_when_the_deadline_has_passed(pair):
    connection, theirs = pair
    asked = []

    def when_late():
        asked.append(1)
        theirs.sendall(frame({"a": 1}))
        return time.monotonic() + 5 if len(asked) == 1 else None

    connection.deadline, connection.when_late = time.monotonic() + 0.1, when_late
    assert connection.receive()[0] == {"a": 1}
    connection.deadline = time.monotonic() - 1
    with pytest.raises(Lost, match="out of time"):
        connection.receive()
    assert len(asked) == 2


def test_what_the_other_side_would_refuse_is_not_sent(pair):
    connection, theirs = pair
    for message, buffers in (({"a": "x" * LARGEST_HEADER}, []), ({}, [bytes(2**20 + 1)])):
        with pytest.raises(OverflowError, match="for one message"):
            connection.send(message, buffers)
    connection.send({"a": 1})
    assert Connection(theirs).receive()[0] == {"a": 1}


def test_a_reply_before_the_request_is_out_of_turn(pair):
    connection, theirs = pair
    theirs.sendall(frame({"id": 1}))
    assert broken(lambda: connection.send({"id": 1})) == "its process answered out of turn"


def test_two_replies_at_once_are_out_of_turn(pair):
    connection, theirs = pair
    theirs.sendall(frame({"id": 1}) + frame({"id": 2}))
    assert broken(connection.receive) == "its process answered out of turn"


@pytest.mark.parametrize(
    "lengths", [(LARGEST_HEADER + 1, 0), (2**32 - 1, 0), (2, 2**20 + 1), (2, 2**64 - 1)]
)
def test_lengths_that_are_too_large_are_refused_before_anything_is_allocated(pair, lengths):
    connection, theirs = pair
    theirs.sendall(struct.pack("<IQ", *lengths) + b"{}")
    assert "more than" in broken(connection.receive)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": "\xff"}',
        '{"a": "ü"}'.encode(),
        b"[" * 1_000_000,
        b'{"a":' * 500_000,
        b'{"a": ' + b"9" * 1_000_000 + b"}",
        b"{} {}",
    ],
    ids=lambda header: repr(header[:9]),
)
def test_what_is_not_a_json_object_is_refused(pair, header):
    connection, theirs = pair
    thread = threading.Thread(target=theirs.sendall, args=(frame(header),))
    thread.start()
    assert broken(connection.receive) == "its process sent a damaged message"
    thread.join()


def test_lost_is_no_exception_that_a_check_could_catch():
    assert not issubclass(Lost, Exception)
    lost = Lost("late", "it ran out of time")
    assert (lost.how, lost.sentence, str(lost)) == ("late", "it ran out of time", lost.sentence)


# Values


def unpack(value, body=b""):
    """What becomes of a hostile value."""
    return Unpacker(memoryview(bytearray(body))).unpack(value)


REFUSED = [
    {},
    {"a": 1, "b": 2},
    {"unknown": 1},
    {"_tensor": 1},
    {"unpack": [1]},
    {"piece": [0, 0]},
    {"numbers": []},
    {"__class__": 1},
    {"TAGS": 1},
    2**53,
    -(2**60),
    {"int": "0x" + "f" * 300},
    {"int": "f" * 4000},
    {"int": 5},
    {"float": "1e5"},
    {"float": []},
    {"str": [0, 9]},
    {"str": [-1, 1]},
    {"str": [0.0, 1]},
    {"str": [True, 1]},
    {"str": [0, -1]},
    {"str": "text"},
    {"str": [0, 1, 2]},
    {"bytes": [2**62, 2**62]},
    {"tuple": {"list": []}},
    {"tuple": 5},
    {"set": [[1]]},
    {"dict": [[1]]},
    {"dict": [[1, 2, 3]]},
    {"dict": [[[1], 2]]},
    {"dict": {"a": 1}},
    {"size": ["a"]},
    {"size": [1.5]},
    {"complex": [1]},
    {"complex": ["a", 1]},
    {"range": [1, 2, 0]},
    {"range": [1, 2, 3, 4]},
    {"deque": [[1], "a"]},
    {"deque": [[1], -1]},
    {"dtype": "float"},
    {"dtype": ["float32"]},
    {"device": "cpu; rm"},
    {"device": "nonsense"},
    {"device": 3},
    {"array": ["O", [1], [0, 8]]},
    {"array": ["object", [1], [0, 8]]},
    {"array": ["float64", [-1], [0, 8]]},
    {"array": ["float64", [2], [0, 8]]},
    {"array": ["datetime64", [1], [0, 8]]},
    {"scalar": ["float64", [0, 4]]},
    {"scalar": ["str", [0, 4]]},
    {"named": ["P", ["a", "a"], [1, 2]]},
    {"named": ["P", ["a"], [1, 2]]},
    {"named": ["P", ["__class__"], [1]]},
    {"named": ["P", ["_fields"], [1]]},
    {"named": ["import os", ["a"], [1]]},
    {"named": ["P", ["class"], [1]]},
    {"named": ["P", ["a b"], [1]]},
    {"named": [5, ["a"], [1]]},
    {"named": ["P", "ab", [1, 2]]},
    {"tensor": ["float32", [2], [0, 4]]},
    {"tensor": ["float32", [1], [0, 8]]},
    {"tensor": ["float32", [-1], [0, 4]]},
    {"tensor": ["float32", [1.0], [0, 4]]},
    {"tensor": ["float32", [True], [0, 4]]},
    {"tensor": ["float32", [2**62, 4], [0, 0]]},
    {"tensor": ["float32", [2**39, 2**39], [0, 0]]},
    {"tensor": ["float32", [2**63, 0], [0, 0]]},
    {"tensor": ["float32", [2**39, 0, 2**39, 2**39], [0, 0]]},
    {"tensor": ["float32", [1] * 65, [0, 4]]},
    {"tensor": ["float32", "ab", [0, 4]]},
    {"tensor": ["quint8", [4], [0, 4]]},
    {"tensor": ["object", [1], [0, 4]]},
    {"tensor": [["float32"], [1], [0, 4]]},
    {"tensor": ["float32", [1, 1], [0, 4], [0, 0]]},
    {"tensor": ["float32", [1, 1], [0, 4], [0]]},
    {"tensor": ["float32", [1, 1], [0, 4], [1, 2]]},
    {"tensor": ["float32", [1, 1], [0, 4], [-1, 0]]},
    {"tensor": ["float32", [1], [0, 4], [0], [0]]},
    {"tensor": ["float32", [1], [6, 4]]},
    {"tensor": []},
    {"tensor": None},
    # Only the grader packs these, and only towards the child.
    {"pickle": [[0, 8], []]},
    {"input": [["float32", [1], [0, 4]], False, False, None]},
    {"strided": [["float32", [1], [0, 4]], [10], [0]]},
    {"generator": [0, 8]},
    {"object": 1},
]


@pytest.mark.parametrize("value", REFUSED, ids=lambda value: json.dumps(value)[:40])
def test_a_value_that_no_packer_makes_is_refused(value):
    with pytest.raises((Lost, Exception)) as caught:
        unpack(value, b"12345678")
    assert not isinstance(caught.value, (MemoryError, SystemError))


def test_a_byte_of_the_body_belongs_to_one_value_only():
    one = {"tensor": ["uint8", [8], [0, 8]]}
    assert unpack(one, b"12345678").tolist() == list(b"12345678")
    assert broken(lambda: unpack([one] * 2, b"12345678"))
    assert broken(lambda: unpack([{"str": [0, 5]}, {"bytes": [2, 4]}], b"12345678"))


def test_nesting_and_the_number_of_parts_are_limited():
    deep = []
    for _ in range(40):
        deep = [deep]
    assert broken(lambda: unpack(deep))
    for _ in range(900):
        deep = {"tuple": [deep]}
    assert broken(lambda: unpack(deep))
    assert broken(lambda: unpack([0] * (MOST_NODES + 1)))
    assert broken(lambda: unpack([[0] * 1000] * 300))


def test_keys_that_share_one_hash_do_not_stop_the_grader():
    # All multiples of 2**61 - 1 have the hash 0: a dictionary of 100,000 takes an hour to fill.
    keys = [{"int": hex(n * (2**61 - 1))} for n in range(1, 100_000)]
    started = time.process_time()
    assert broken(lambda: unpack({"set": keys}))
    assert broken(lambda: unpack({"dict": [[key, 0] for key in keys]}))
    assert broken(lambda: unpack({"frozenset": keys}))
    assert time.process_time() - started < 10
    assert len(unpack({"set": list(range(50_000))})) == 50_000


def test_numbers_at_odd_addresses_are_read_safely():
    for dtype, size in (("complex128", 16), ("float64", 8), ("bfloat16", 2), ("uint64", 8)):
        body = bytes(200)
        for offset in range(1, 9):
            tensor = unpack({"tensor": [dtype, [5], [offset, 5 * size]]}, body)
            assert (tensor.clone() == 0).all()
            assert tensor.data_ptr() % 16 == 0


def test_a_truth_value_is_zero_or_one():
    body = bytes([0, 1, 2, 255])
    tensor = unpack({"tensor": ["bool", [4], [0, 4]]}, body)
    assert tensor.tolist() == [False, True, True, True]
    assert torch.equal(tensor, torch.tensor([False, True, True, True]))
    assert tensor.sum() == 3
    assert (tensor == torch.tensor([False, True, True, True])).all()
    assert tensor.view(torch.uint8).max() == 1
    array = unpack({"array": ["bool", [4], [0, 4]]}, body)
    assert array.sum() == 3
    assert array.view("uint8").max() == 1


def test_a_received_tensor_is_an_ordinary_one():
    tensor = unpack({"tensor": ["float32", [2, 1], [0, 8], [1, 0]]}, bytes(8))
    tensor.resize_(5)
    empty = unpack({"tensor": ["float32", [0, 3], [0, 0]]})
    assert empty.shape == (0, 3)
    assert type(tensor) is torch.Tensor


def roundtrip(value):
    packer = Packer()
    packed = json.loads(json.dumps(packer.pack(value)))
    return Unpacker(memoryview(bytearray(b"".join(packer.buffers)))).unpack(packed)


def test_plain_values_survive_the_journey():
    values = [None, True, -1, 2.5, 2**70, "a" * 300, b"b", (1, [2]), {"k": {1}}, range(3)]
    assert roundtrip(values) == values
    assert math.isnan(roundtrip(math.nan))
    assert math.copysign(1, roundtrip(-0.0)) == -1
    for tensor in (
        torch.randn(2, 3).T,
        torch.randn(4, 1, 2)[:, :, ::2],
        torch.ones(3).expand(2, 3),
    ):
        assert torch.equal(roundtrip(tensor), tensor)
    assert roundtrip(torch.randn(2, 3).T).stride() == (1, 3)
    assert torch.equal(
        roundtrip(torch.view_as_complex(torch.ones(2, 2)).conj()), torch.tensor([1 - 1j] * 2)
    )


def test_what_no_packer_knows_cannot_travel():
    for value in (object(), len, 2**1024, type("L", (list,), {})(), [[0] * 500] * 500):
        with pytest.raises(CannotTravel):
            Packer().pack(value)


def test_fields_of_a_named_tuple_are_plain_names():
    class Evil(tuple):
        _fields = ("a", "__class__")

    assert fields_of(Evil) == ()
    assert fields_of(tuple) == ()
    assert fields_of(torch.return_types.max) == ("values", "indices")
    assert fields_of(torch.return_types.topk) == ("values", "indices")
    assert fields_of(torch.return_types.svd) == ()


def test_same_bytes_tells_bits_apart():
    zero, minus = torch.zeros(2), -torch.zeros(2)
    nan = torch.tensor([math.nan, 1.0])
    assert same_bytes(nan, nan.clone())
    assert not same_bytes(zero, minus)
    assert not same_bytes(zero, zero.double())
    assert not same_bytes(zero, zero[None])
    x = torch.randn(3, 4)
    assert same_bytes(x.T, x.T.contiguous())
    assert not same_bytes(x.T, x.T + 1)
    assert same_bytes(torch.empty(0), torch.empty(0))
