"""A visible check passes right values, names known mistakes, and otherwise says what differed."""

import json
import math

import pytest
import torch

from mmlearn import feedback
from mmlearn.feedback import expect, expect_raises, fingerprint, own_work, recording

PROBE = "w99_sample/softmax/hand"
PLAIN = "Work it by hand."


@pytest.fixture
def known(tmp_path, monkeypatch):
    """A fingerprint file; call it with {probe: [(value, sentence)]}."""
    path = tmp_path / "fingerprints.json"
    monkeypatch.setattr(feedback, "FINGERPRINTS", path)

    def write(mistakes):
        probes = {
            probe: [{"value": fingerprint(value), "says": says} for value, says in pairs]
            for probe, pairs in mistakes.items()
        }
        path.write_text(json.dumps({"probes": probes, "sources": {}}))
        return path

    return write


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0])),
        (torch.tensor([1.00005]), torch.tensor([1.0])),  # within rtol 1e-4
        (torch.tensor(0.5, requires_grad=True), 0.5),
        (0.5, torch.tensor(0.5)),
        (torch.tensor([1.0], dtype=torch.float64), torch.tensor([1.0])),
        (torch.tensor([-math.inf, 0.0]), torch.tensor([-math.inf, 0.0])),
        (torch.tensor([math.nan]), torch.tensor([math.nan])),
        (torch.tensor([True, False]), torch.tensor([True, False])),
        (True, True),
        ("a photo of a cat", "a photo of a cat"),
        (None, None),
        ([1, 2.0, [torch.tensor(3)]], (1, 2, [3])),
        (torch.empty(0, 3), torch.empty(0, 3)),
        (torch.tensor([1.0]).numpy(), torch.tensor([1.0])),
    ],
)
def test_a_right_value_passes_in_any_form(got, want):
    expect(PROBE, got, want, PLAIN)


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (torch.tensor([1.001]), torch.tensor([1.0])),
        (torch.tensor([[1.0, 2.0]]), torch.tensor([1.0, 2.0])),
        (torch.tensor([math.nan]), torch.tensor([0.0])),
        (torch.tensor([math.inf]), torch.tensor([-math.inf])),
        (torch.tensor([1.0]), torch.tensor([True])),
        (1, True),
        (0.5, None),
        (None, 0.5),
        ([1, 2], [1, 2, 3]),
        ([1, 2], torch.tensor([1, 2])),
        ("cat", "dog"),
        (object(), 1.0),
    ],
)
def test_a_wrong_value_fails_with_the_plain_sentence_and_both_values(got, want):
    with pytest.raises(AssertionError, match=PLAIN) as failure:
        expect(PROBE, got, want, PLAIN)
    assert "yours: " in str(failure.value)
    assert "wanted: " in str(failure.value)


def test_a_wrong_shape_names_both_shapes():
    with pytest.raises(AssertionError, match=r"\(2, 3\); wanted: .*\(3, 2\)"):
        expect(PROBE, torch.zeros(2, 3), torch.zeros(3, 2), PLAIN)


def test_the_tolerance_can_be_widened():
    expect(PROBE, 1.01, 1.0, PLAIN, rtol=0.1)


def test_a_known_mistake_is_named(known):
    known({PROBE: [(torch.tensor([2.0, 3.0]), "You forgot the mean.")]})
    with pytest.raises(AssertionError, match=r"^You forgot the mean\.\n  yours: 2, 3 in shape"):
        expect(PROBE, torch.tensor([2.00001, 3.0]), torch.tensor([1.0, 1.5]), PLAIN)


def test_a_mistake_is_known_only_at_its_own_probe(known):
    known({"w99_sample/softmax/other": [(2.0, "You forgot the mean.")]})
    with pytest.raises(AssertionError, match=PLAIN):
        expect(PROBE, 2.0, 1.0, PLAIN)


def test_a_right_value_passes_even_if_a_mistake_gives_the_same(known):
    known({PROBE: [(1.0, "You forgot the mean.")]})
    expect(PROBE, 1.0, 1.0, PLAIN)


def test_two_mistakes_with_one_value_are_both_named_and_three_are_not(known):
    known({PROBE: [(2.0, "Slip A."), (2.0, "Slip B.")]})
    with pytest.raises(AssertionError, match=r"^Slip A\.\nOr: Slip B\."):
        expect(PROBE, 2.0, 1.0, PLAIN)
    known({PROBE: [(2.0, "Slip A."), (2.0, "Slip B."), (2.0, "Slip C.")]})
    with pytest.raises(AssertionError, match=PLAIN):
        expect(PROBE, 2.0, 1.0, PLAIN)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "not json",
        "[]",
        "{}",
        '{"probes": 3}',
        '{"probes": {"w99_sample/softmax/hand": 3}}',
        '{"probes": {"w99_sample/softmax/hand": [{"value": 2.0}]}}',
        '{"probes": {"w99_sample/softmax/hand": ["x"]}}',
    ],
)
def test_a_damaged_file_leaves_the_plain_sentence(known, content):
    known({}).write_text(content)
    with pytest.raises(AssertionError, match=PLAIN):
        expect(PROBE, 2.0, 1.0, PLAIN)


def test_a_missing_file_leaves_the_plain_sentence(known):
    with pytest.raises(AssertionError, match=PLAIN):
        expect(PROBE, 2.0, 1.0, PLAIN)


def test_an_expected_error_gives_its_message():
    assert expect_raises(PROBE, ValueError, lambda: int("x"), PLAIN).startswith("invalid literal")


def test_no_error_or_another_error_fails_and_can_be_known(known):
    with pytest.raises(AssertionError, match=rf"{PLAIN}\n  raised: nothing; wanted: ValueError"):
        expect_raises(PROBE, ValueError, lambda: None, PLAIN)
    with pytest.raises(AssertionError, match="raised: KeyError; wanted: ValueError"):
        expect_raises(PROBE, ValueError, lambda: {}["x"], PLAIN)
    path = known({})
    mistake = {"value": {"raised": "KeyError"}, "says": "A KeyError names no argument."}
    path.write_text(json.dumps({"probes": {PROBE: [mistake]}}))
    with pytest.raises(AssertionError, match="A KeyError names no argument"):
        expect_raises(PROBE, ValueError, lambda: {}["x"], PLAIN)


def test_an_error_on_the_way_to_a_value_can_be_known_too(known):
    expect(PROBE, lambda: 1.0, 1.0, PLAIN)
    with pytest.raises(AssertionError, match=rf"{PLAIN}\n  raised: KeyError: 'x'; wanted: 1"):
        expect(PROBE, lambda: {}["x"], 1.0, PLAIN)
    with recording() as records:
        expect(PROBE, lambda: {}["x"], 1.0, PLAIN)
    known({}).write_text(
        json.dumps({"probes": {PROBE: [{"value": records[0][1], "says": "There is no x."}]}})
    )
    with pytest.raises(AssertionError, match=r"^There is no x\."):
        expect(PROBE, lambda: {}["x"], 1.0, PLAIN)


def test_an_answer_not_yet_written_is_no_mistake():
    def stub():
        raise NotImplementedError()

    with pytest.raises(NotImplementedError):
        expect(PROBE, stub, 1.0, PLAIN)
    with pytest.raises(NotImplementedError):
        expect_raises(PROBE, RuntimeError, stub, PLAIN)  # NotImplementedError is a RuntimeError


def test_recording_notes_wrong_values_and_never_fails():
    with recording() as records:
        expect(PROBE, 1.0, 1.0, PLAIN)
        expect(PROBE, torch.tensor([0.1, 0.2]), torch.zeros(2), PLAIN)
        expect_raises(PROBE, ValueError, lambda: None, PLAIN)
    assert records == [(PROBE, {"shape": [2], "values": [0.1, 0.2]}), (PROBE, {"raised": ""})]
    with pytest.raises(AssertionError):
        expect(PROBE, 1.0, 2.0, PLAIN)


def test_a_fingerprint_forgets_what_differs_between_machines():
    numbers = torch.tensor([1 / 3, 1e-3, 123456.7])
    wandered = numbers * (1 + 2e-7)  # two units in the last place of a float32
    assert fingerprint(numbers) == fingerprint(wandered)
    assert fingerprint(torch.tensor([-0.0, math.nan, -math.inf])) == {
        "shape": [3],
        "values": [0.0, "nan", "-inf"],
    }


def test_fingerprints_are_plain_json_and_survive_it():
    value = [torch.randn(3, 40), "text", None, [True, 2], torch.tensor(1.5)]
    print_of_value = fingerprint(value)
    assert json.loads(json.dumps(print_of_value, allow_nan=False)) == print_of_value


def test_fingerprints_of_large_tensors_stay_small_and_tell_permutations_apart():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(100, 100, generator=generator)
    swapped = values.clone()
    swapped[1, 2], swapped[90, 3] = values[90, 3], values[1, 2]
    prints = [fingerprint(v) for v in (values, swapped, values.T, values * 2, values.flatten())]
    assert len(json.dumps(prints[0])) < 600
    assert len({json.dumps(p) for p in prints}) == len(prints)


def test_mmlearn_s_own_function_or_class_is_not_the_learner_s_work():
    def mine():
        return 1

    own_work(mine, dict, 3, torch.zeros(1))
    for borrowed in (expect, recording):
        with pytest.raises(AssertionError, match=r"comes from mmlearn\.feedback, so it earns"):
            own_work(mine, borrowed)
