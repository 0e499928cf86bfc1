"""The metrics against torchmetrics, scikit-learn and jiwer, by hand, and by their laws."""

import math

import jiwer
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from mmlearn.metrics import (
    accuracy,
    character_error_rate,
    edit_distance,
    expected_calibration_error,
    match_ranks,
    mean_and_spread,
    median_rank,
    precision_recall_f1,
    recall_at_k,
    word_error_rate,
)

# Means of float32 numbers between 0 and 1: a few units in the last place.
CLOSE = pytest.approx


def random_classification(seed, num_examples=97, num_classes=5):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(num_examples, num_classes, generator=generator)
    labels = torch.randint(num_classes, (num_examples,), generator=generator)
    return logits, labels


def one_hot_logits(predictions, num_classes):
    return torch.nn.functional.one_hot(torch.tensor(predictions), num_classes).float()


# --- classification ---


@pytest.mark.parametrize("seed", range(5))
def test_classification_equals_scikit_learn_and_torchmetrics(seed):
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support
    from torchmetrics.functional import classification as theirs

    logits, labels = random_classification(seed)
    predictions = logits.argmax(dim=-1)
    assert accuracy(logits, labels) == CLOSE(accuracy_score(labels, predictions), abs=1e-6)
    wanted = precision_recall_fscore_support(labels, predictions, average="macro")[:3]
    got = precision_recall_f1(logits, labels)
    assert tuple(got) == CLOSE(wanted, abs=1e-6)
    f1 = theirs.multiclass_f1_score(logits, labels, num_classes=5, average="macro")
    assert got.f1 == CLOSE(f1.item(), abs=1e-6)


@pytest.mark.parametrize("num_bins", [1, 4, 15])
def test_calibration_error_equals_torchmetrics(num_bins):
    from torchmetrics.functional.classification import multiclass_calibration_error

    logits, labels = random_classification(0, num_examples=501)
    wanted = multiclass_calibration_error(logits, labels, num_classes=5, n_bins=num_bins)
    got = expected_calibration_error(logits, labels, num_bins)
    assert got == CLOSE(wanted.item(), abs=1e-5)


def test_precision_recall_and_f1_worked_by_hand():
    # class 0: 2 of 3 predictions right, 2 of 2 found; class 1: 1 of 1, 1 of 2; class 2: none seen
    got = precision_recall_f1(one_hot_logits([0, 0, 0, 1], 3), torch.tensor([0, 0, 1, 1]))
    assert got.precision == CLOSE((2 / 3 + 1) / 2)
    assert got.recall == CLOSE((1 + 1 / 2) / 2)
    assert got.f1 == CLOSE((4 / 5 + 2 / 3) / 2)


def test_calibration_error_worked_by_hand():
    # Two examples at 80% confidence, one of them right: the gap is 0.8 - 0.5.
    logits = torch.log(torch.tensor([[0.8, 0.2], [0.8, 0.2]]))
    assert expected_calibration_error(logits, torch.tensor([0, 1])) == CLOSE(0.3, abs=1e-6)


def test_full_confidence_that_is_right_is_calibrated_and_wrong_is_not():
    logits = torch.tensor([[1000.0, 0.0]])
    assert expected_calibration_error(logits, torch.tensor([0])) == 0
    assert expected_calibration_error(logits, torch.tensor([1])) == 1


def test_ignoring_a_rare_class_costs_recall_and_hardly_any_accuracy():
    labels = torch.tensor([0] * 99 + [1])
    logits = one_hot_logits([0] * 100, 2)
    assert accuracy(logits, labels) == CLOSE(0.99)
    assert precision_recall_f1(logits, labels).recall == CLOSE(0.5)


def test_classification_does_not_depend_on_the_order_of_examples_or_the_scale_of_logits():
    logits, labels = random_classification(3)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    assert accuracy(logits[order] * 7, labels[order]) == accuracy(logits, labels)
    shuffled = precision_recall_f1(logits[order] * 7, labels[order])
    assert tuple(shuffled) == CLOSE(tuple(precision_recall_f1(logits, labels)), abs=1e-6)


@pytest.mark.parametrize("metric", [accuracy, precision_recall_f1, expected_calibration_error])
def test_classification_refuses_what_it_cannot_score(metric):
    logits, labels = torch.zeros(3, 4), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"labels hold 4, wanted 0 to 3"):
        metric(logits, torch.tensor([0, 1, 4]))
    with pytest.raises(ValueError, match=r"labels hold -100"):  # PyTorch's "ignore this one"
        metric(logits, torch.tensor([0, 1, -100]))
    with pytest.raises(ValueError, match="at least one example"):
        metric(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match="logits hold NaN"):
        metric(logits.index_fill(1, labels[:1], math.nan), labels)
    with pytest.raises((ValueError, TypeCheckError), match="labels"):
        metric(logits, labels[:2])


def test_calibration_needs_a_bin():
    with pytest.raises(ValueError, match="num_bins=0"):
        expected_calibration_error(torch.zeros(1, 2), torch.tensor([0]), num_bins=0)


# --- retrieval ---


@pytest.mark.parametrize("k", [1, 3, 7])
def test_recall_at_k_equals_torchmetrics_both_ways(k):
    from torchmetrics.retrieval import RetrievalHitRate, RetrievalRecall

    # positive, because torchmetrics takes a score of 0 or less for "not found"
    similarity = torch.rand(7, 7, generator=torch.Generator().manual_seed(k))
    queries = torch.arange(7).repeat_interleave(7)
    is_match = torch.eye(7, dtype=torch.bool).flatten()
    for metric in (RetrievalHitRate, RetrievalRecall):  # the same where a query has one match
        to_text = metric(top_k=k)(similarity.flatten(), is_match, indexes=queries)
        to_image = metric(top_k=k)(similarity.T.flatten(), is_match, indexes=queries)
        got = recall_at_k(similarity, k)
        assert got.image_to_text == CLOSE(to_text.item(), abs=1e-6)
        assert got.text_to_image == CLOSE(to_image.item(), abs=1e-6)


def test_recall_with_several_texts_an_image_equals_torchmetrics_hit_rate():
    from torchmetrics.retrieval import RetrievalHitRate

    similarity = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    matches = torch.arange(4)[:, None] == torch.arange(12)[None, :] // 3
    got = recall_at_k(similarity, 2, matches)
    hits = RetrievalHitRate(top_k=2)
    queries = torch.arange(4)[:, None].expand(4, 12)
    wanted = hits(similarity.flatten(), matches.flatten(), indexes=queries.flatten())
    assert got.image_to_text == CLOSE(wanted.item(), abs=1e-6)


def test_retrieval_worked_by_hand():
    similarity = torch.tensor([[0.9, 0.1, 0.2], [0.8, 0.7, 0.1], [0.3, 0.6, 0.5]])
    assert match_ranks(similarity).tolist() == [1, 2, 2]
    assert match_ranks(similarity.T).tolist() == [1, 1, 1]
    assert recall_at_k(similarity, 1) == (CLOSE(1 / 3), 1.0)
    assert recall_at_k(similarity, 2) == (1.0, 1.0)
    assert median_rank(similarity) == (2.0, 1.0)


def test_the_median_of_an_even_number_of_ranks_is_the_middle_of_both():
    assert median_rank(torch.tensor([[1.0, 0.0], [1.0, 0.0]])).image_to_text == 1.5


def test_a_collapsed_model_gets_no_credit():
    assert recall_at_k(torch.ones(5, 5), 1) == (0.0, 0.0)
    assert median_rank(torch.ones(5, 5)) == (5.0, 5.0)


def test_recall_grows_with_k_to_one_and_ignores_scale_and_a_common_order():
    similarity = torch.randn(9, 9, generator=torch.Generator().manual_seed(1))
    recalls = [recall_at_k(similarity, k).image_to_text for k in range(1, 10)]
    assert recalls == sorted(recalls)
    assert recalls[-1] == 1
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    same = 100 * similarity[order][:, order] - 3
    assert [recall_at_k(same, k).image_to_text for k in range(1, 10)] == CLOSE(recalls, abs=1e-6)
    ways = recall_at_k(similarity, 2)
    assert recall_at_k(similarity.T, 2) == (ways.text_to_image, ways.image_to_text)


def test_retrieval_refuses_what_it_cannot_rank():
    square = torch.zeros(3, 3)
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"k={k}, wanted 1 to 3"):
            recall_at_k(square, k)
    with pytest.raises(ValueError, match="NaN"):
        median_rank(torch.full((3, 3), math.nan))
    with pytest.raises(ValueError, match="empty"):
        median_rank(torch.zeros(0, 0))
    with pytest.raises(ValueError, match=r"shape \(2, 3\), not one text an image"):
        match_ranks(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="row 1 no match"):
        match_ranks(square, torch.eye(3, dtype=torch.bool) & (torch.arange(3) != 1))
    with pytest.raises((ValueError, TypeCheckError), match="matches_IT"):
        match_ranks(square, torch.ones(3, 2, dtype=torch.bool))


# --- recognition ---

SPOKEN = st.lists(st.sampled_from(["one", "two", "zwölf", "猫", "e\u0301"]), max_size=8)
PAIRS = st.lists(st.tuples(SPOKEN.filter(bool), SPOKEN), min_size=1, max_size=5)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(PAIRS)
def test_error_rates_equal_jiwer(pairs):
    references, hypotheses = ([" ".join(words) for words in side] for side in zip(*pairs))
    assert word_error_rate(references, hypotheses) == CLOSE(jiwer.wer(references, hypotheses))
    assert character_error_rate(references, hypotheses) == CLOSE(jiwer.cer(references, hypotheses))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(PAIRS)
def test_error_rates_equal_torchmetrics(pairs):
    from torchmetrics.functional.text import char_error_rate
    from torchmetrics.functional.text import word_error_rate as theirs

    references, hypotheses = ([" ".join(words) for words in side] for side in zip(*pairs))
    got = word_error_rate(references, hypotheses), character_error_rate(references, hypotheses)
    assert got[0] == CLOSE(theirs(hypotheses, references).item(), abs=1e-5)
    assert got[1] == CLOSE(char_error_rate(hypotheses, references).item(), abs=1e-5)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "edits"),
    [
        ("kitten", "sitting", 3),
        ("", "abc", 3),
        ("abc", "", 3),
        ("", "", 0),
        (["the", "cat"], ["the", "fat", "cat"], 1),
    ],
)
def test_edit_distances_worked_by_hand(reference, hypothesis, edits):
    assert edit_distance(reference, hypothesis) == edits


@settings(max_examples=200, deadline=None, derandomize=True)
@given(*[st.text("abc", max_size=7)] * 3)
def test_edit_distance_is_a_distance(a, b, c):
    assert (edit_distance(a, b) == 0) == (a == b)
    assert edit_distance(a, b) == edit_distance(b, a)
    assert edit_distance(a, c) <= edit_distance(a, b) + edit_distance(b, c)
    assert abs(len(a) - len(b)) <= edit_distance(a, b) <= max(len(a), len(b))


def test_error_rates_weigh_texts_by_their_length_and_can_exceed_one():
    # 1 of 4 words and 0 of 1, not the mean of 1/4 and 0
    assert word_error_rate(["a b c d", "e"], ["a b c x", "e"]) == CLOSE(1 / 5)
    assert character_error_rate(["a"], ["a b c"]) == CLOSE(4)


def test_error_rates_refuse_what_has_no_rate():
    for rate in (word_error_rate, character_error_rate):
        with pytest.raises(ValueError, match="2 references and 1 hypotheses"):
            rate(["a", "b"], ["a"])
        with pytest.raises(ValueError, match="references hold nothing"):
            rate([], [])
        with pytest.raises(ValueError, match="references hold nothing"):
            rate([" "], ["a"])
        with pytest.raises(ValueError, match="hypotheses is a single string"):
            rate(["one"], "one")


# --- several runs ---


def test_the_spread_divides_by_one_run_less():
    mean, spread = mean_and_spread([1.0, 2.0, 3.0, 4.0])
    assert (mean, spread) == (2.5, CLOSE(math.sqrt(5 / 3)))
    assert str(mean_and_spread(torch.tensor([0.5, 0.75]))) == "0.625 ± 0.177"


def test_one_run_has_no_spread_and_none_or_a_failed_one_is_refused():
    assert mean_and_spread([0.9]).mean == 0.9
    assert math.isnan(mean_and_spread([0.9]).spread)
    assert str(mean_and_spread([0.9])) == "0.900 (one run)"
    for values in ([], [0.9, math.nan]):
        with pytest.raises(ValueError, match="one number for each run"):
            mean_and_spread(values)
