"""How good is it? The numbers that the course reports, each in a few lines.

classification   accuracy, precision_recall_f1, expected_calibration_error
retrieval        match_ranks, recall_at_k, median_rank, each from images to texts and back
recognition      edit_distance, character_error_rate, word_error_rate
several runs     mean_and_spread
"""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from statistics import fmean, stdev
from typing import NamedTuple, SupportsFloat

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class PrecisionRecallF1(NamedTuple):
    """Each the mean over classes, from 0 to 1."""

    precision: float
    recall: float
    f1: float


class BothWays(NamedTuple):
    """One number for finding texts by image, one for finding images by text."""

    image_to_text: float
    text_to_image: float


class MeanAndSpread(NamedTuple):
    """The mean of several runs and their sample standard deviation."""

    mean: float
    spread: float

    def __str__(self) -> str:
        if math.isnan(self.spread):
            return f"{self.mean:.3f} (one run)"
        return f"{self.mean:.3f} ± {self.spread:.3f}"


def accuracy(logits: Float[Tensor, "B C"], labels: Int[Tensor, "B"]) -> float:
    """Return the share of examples whose largest logit is that of their label.

    Raises: ValueError for no example, NaN, a label outside the classes, or lengths that differ.
    """
    _check_classification(logits, labels)
    return (logits.argmax(dim=-1) == labels).float().mean().item()


def precision_recall_f1(
    logits: Float[Tensor, "B C"], labels: Int[Tensor, "B"]
) -> PrecisionRecallF1:
    r"""Return precision, recall and their harmonic mean, averaged over classes.

    $$ P_c = \frac{\text{right}_c}{\text{predicted}_c}, \quad
       R_c = \frac{\text{right}_c}{\text{labelled}_c}, \quad F_c = \frac{2 P_c R_c}{P_c + R_c} $$

    Every class weighs the same, however rare: a model that ignores a rare class can keep its
    accuracy, but not its recall. 0/0 counts as 0; classes neither labelled nor predicted are left
    out.

    Raises: as `accuracy`.
    """
    _check_classification(logits, labels)
    predictions, num_classes = logits.argmax(dim=-1), logits.shape[-1]
    right = predictions[predictions == labels].bincount(minlength=num_classes)
    predicted = predictions.bincount(minlength=num_classes)
    labelled = labels.bincount(minlength=num_classes)
    seen = predicted + labelled > 0
    right, predicted, labelled = (n[seen].float() for n in (right, predicted, labelled))
    precision, recall = right / predicted.clamp(min=1), right / labelled.clamp(min=1)
    f1 = 2 * right / (predicted + labelled)
    return PrecisionRecallF1(*(x.mean().item() for x in (precision, recall, f1)))


def expected_calibration_error(
    logits: Float[Tensor, "B C"], labels: Int[Tensor, "B"], num_bins: int = 15
) -> float:
    r"""Return how far the model's confidence is from its accuracy, from 0 to 1.

    $$ \mathrm{ECE} = \sum_b \frac{n_b}{n}\,
       \bigl|\,\mathrm{accuracy}_b - \mathrm{confidence}_b\,\bigr| $$

    Confidence is the largest probability. Examples of like confidence share one of `num_bins` bins
    of equal width; a model that is 80% sure should be right in 80% of them.

    Raises: as `accuracy`, and ValueError when num_bins is below 1.
    Source: Guo et al. 2017, equation 3.
    """
    _check_classification(logits, labels)
    if num_bins < 1:
        raise ValueError(f"num_bins={num_bins}, wanted at least 1")
    confidence, predictions = logits.softmax(dim=-1).max(dim=-1)
    edges = torch.linspace(0, 1, num_bins + 1, dtype=logits.dtype, device=logits.device)
    bins = torch.bucketize(confidence, edges[1:-1], right=True)
    # The bin's n cancels: n_b/n · |sum/n_b| is |sum|/n.
    gaps = (predictions == labels).float() - confidence.float()
    gap_per_bin = gaps.new_zeros(num_bins).index_add(0, bins, gaps)
    return gap_per_bin.abs().sum().item() / len(labels)


def match_ranks(
    similarity_IT: Float[Tensor, "I T"], matches_IT: Bool[Tensor, "I T"] | None = None
) -> Int[Tensor, "I"]:
    """Return the place of each image's best matching text, 1 for the most similar.

    A wrong text with the same similarity is placed before the right one, so that a collapsed model,
    for which all are alike, gets no credit. `matches_IT` says which texts belong to which image;
    without it, the i-th text belongs to the i-th image.

    Raises: ValueError for NaN, an empty or non-square matrix, or an image without any match.
    """
    if similarity_IT.numel() == 0 or similarity_IT.isnan().any():
        raise ValueError(
            f"similarity_IT of shape {tuple(similarity_IT.shape)} is empty or holds NaN"
        )
    if matches_IT is None:
        if similarity_IT.shape[0] != similarity_IT.shape[1]:
            raise ValueError(
                f"similarity_IT has shape {tuple(similarity_IT.shape)}, not one text an image; "
                "say with matches_IT which texts belong to which image"
            )
        matches_IT = torch.eye(len(similarity_IT), dtype=torch.bool, device=similarity_IT.device)
    if matches_IT.shape != similarity_IT.shape:
        raise ValueError(
            f"matches_IT has shape {tuple(matches_IT.shape)}, wanted that of similarity_IT, "
            f"{tuple(similarity_IT.shape)}"
        )
    if not (has_match := matches_IT.any(dim=1)).all():
        raise ValueError(f"matches_IT gives row {int(has_match.int().argmin())} no match")
    best_I1 = similarity_IT.masked_fill(~matches_IT, -math.inf).amax(dim=1, keepdim=True)
    return 1 + ((similarity_IT >= best_I1) & ~matches_IT).sum(dim=1)


def recall_at_k(
    similarity_IT: Float[Tensor, "I T"], k: int, matches_IT: Bool[Tensor, "I T"] | None = None
) -> BothWays:
    """Return the share of queries that find a match among the k most similar, both ways.

    Raises: as `match_ranks`, and ValueError when k is below 1 or above what there is to find.
    """
    if not 1 <= k <= min(similarity_IT.shape):
        raise ValueError(f"k={k}, wanted 1 to {min(similarity_IT.shape)}, the smaller side")
    return _both_ways(lambda ranks: (ranks <= k).float().mean(), similarity_IT, matches_IT)


def median_rank(
    similarity_IT: Float[Tensor, "I T"], matches_IT: Bool[Tensor, "I T"] | None = None
) -> BothWays:
    """Return the median of `match_ranks`, both ways. 1 is best; chance is half the candidates.

    Raises: as `match_ranks`.
    """
    return _both_ways(lambda ranks: ranks.float().quantile(0.5), similarity_IT, matches_IT)


def edit_distance(reference: Sequence[Hashable], hypothesis: Sequence[Hashable]) -> int:
    r"""Return the fewest insertions, deletions and replacements that turn one into the other.

    $$ d_{ij} = \min(d_{i-1,j} + 1,\; d_{i,j-1} + 1,\; d_{i-1,j-1} + [r_i \ne h_j]) $$

    Strings are compared letter by letter, lists item by item. Only the last row is kept.

    Source: Levenshtein 1966; Wagner and Fischer 1974.
    """
    row = list(range(len(hypothesis) + 1))
    for i, wanted in enumerate(reference, start=1):
        diagonal, row[0] = row[0], i
        for j, given in enumerate(hypothesis, start=1):
            above = row[j]
            row[j] = min(above + 1, row[j - 1] + 1, diagonal + (wanted != given))
            diagonal = above
    return row[-1]


def character_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    r"""Return edits per character of the references, over all texts together.

    $$ \mathrm{CER} = \frac{\sum_n d(r_n, h_n)}{\sum_n |r_n|} $$

    It is above 1 when much is inserted. White space at either end is dropped.

    Raises: ValueError for no text, lists that differ in length, or references without a character.
    """
    return _error_rate(references, hypotheses, str.strip)


def word_error_rate(references: Sequence[str], hypotheses: Sequence[str]) -> float:
    """Return edits per word of the references, over all texts together; words end at white space.

    Raises: ValueError for no text, lists that differ in length, or references without a word.
    """
    return _error_rate(references, hypotheses, str.split)


def mean_and_spread(values: Iterable[SupportsFloat]) -> MeanAndSpread:
    r"""Return the mean of several runs and their sample standard deviation.

    $$ s = \sqrt{\tfrac{1}{n-1} \textstyle\sum_i (x_i - \bar{x})^2} $$

    Dividing by n would make few seeds look steadier than they are. One run has no spread: NaN.

    Raises: ValueError for no value, or NaN.
    """
    runs = [float(value) for value in values]
    if not runs or any(map(math.isnan, runs)):
        raise ValueError(f"values is {runs}, wanted one number for each run and no NaN")
    return MeanAndSpread(fmean(runs), stdev(runs) if len(runs) > 1 else math.nan)


def _check_classification(logits: Tensor, labels: Tensor) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or logits.numel() == 0:
        raise ValueError(
            f"logits have shape {tuple(logits.shape)} and labels {tuple(labels.shape)}, wanted "
            "(batch, classes) and (batch,) with at least one example"
        )
    if logits.isnan().any():
        raise ValueError("logits hold NaN; look for the step that made it")
    low, high = labels.aminmax()
    if low < 0 or high >= logits.shape[1]:
        raise ValueError(
            f"labels hold {int(low if low < 0 else high)}, wanted 0 to {logits.shape[1] - 1}, one "
            "for each column of logits"
        )


def _both_ways(
    summary: Callable[[Tensor], Tensor], similarity_IT: Tensor, matches_IT: Tensor | None
) -> BothWays:
    matches_TI = None if matches_IT is None else matches_IT.T
    ways = (similarity_IT, matches_IT), (similarity_IT.T, matches_TI)
    return BothWays(*(summary(match_ranks(*way)).item() for way in ways))


def _error_rate(
    references: Sequence[str], hypotheses: Sequence[str], split: Callable[[str], Sequence[str]]
) -> float:
    for name, texts in (("references", references), ("hypotheses", hypotheses)):
        if isinstance(texts, str):
            raise ValueError(f"{name} is a single string; put it into a list")
    if len(references) != len(hypotheses):
        raise ValueError(
            f"there are {len(references)} references and {len(hypotheses)} hypotheses; give one "
            "hypothesis for each reference"
        )
    pairs = [(split(r), split(h)) for r, h in zip(references, hypotheses, strict=True)]
    length = sum(len(reference) for reference, _ in pairs)
    if length == 0:
        raise ValueError("references hold nothing to recognise; an error rate needs a length")
    return sum(edit_distance(*pair) for pair in pairs) / length
