"""What a visible check says: it recognises known mistakes by the numbers they give.

A check compares what your code returned at a named probe with what was wanted:

    expect("w03_clip/clip_loss/hand", clip_loss(images, texts, 10.0), 0.3133, "By hand it is ...")

If the two differ, your value is looked up among the values that known wrong answers gave at the
same probe, and you read the sentence written for that mistake. The file beside this module holds
those values and sentences, never an answer's code; without the file you read the plain message.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FINGERPRINTS = Path(__file__).with_name("fingerprints.json")
_recorded = None  # a list of (probe, fingerprint) while the course's build records wrong answers


def expect(
    probe: str, got: Any, want: Any, otherwise: str, rtol: float = 1e-4, atol: float = 1e-5
) -> None:
    """Pass if got equals want within the tolerance; otherwise say why not, as well as is known.

    Tensors, numbers, booleans, text, None, and lists and tuples of them can be compared. A number
    and a tensor without dimensions are the same thing; a shape that differs is a failure. Give a
    function without arguments as `got` where a mistake may raise an error: it is recognised, too.
    Raises: AssertionError, with the sentence of the mistake recognised, else with `otherwise`;
        NotImplementedError as it comes, from an answer that is not yet written.
    """
    if callable(got):
        try:
            got = got()
        except NotImplementedError:
            raise
        except Exception as error:
            raised = type(error).__name__
            comparison = f"raised: {raised}: {error}; wanted: {_show(want)}"
            _report(probe, {"raised": raised}, otherwise, comparison)
            return
    if not _same(got, want, rtol, atol):
        _report(probe, fingerprint(got), otherwise, f"yours: {_show(got)}; wanted: {_show(want)}")


def expect_raises(
    probe: str, error_type: type[Exception], call: Callable[[], Any], otherwise: str
) -> str:
    """Pass if call() raises an error of that type, and return its message.

    Raises: as `expect` does, if another error is raised or none.
    """
    try:
        call()
        outcome = ""
    except NotImplementedError:
        raise
    except error_type as error:
        return str(error)
    except Exception as error:
        outcome = type(error).__name__
    comparison = f"raised: {outcome or 'nothing'}; wanted: {error_type.__name__}"
    _report(probe, {"raised": outcome}, otherwise, comparison)
    return ""


def own_work(*answers: Any) -> None:
    """Fail if an answer is mmlearn's own function or class instead of the learner's.

    Raises: AssertionError, naming the answer and where it comes from.
    """
    for answer in answers:
        home = str(getattr(answer, "__module__", ""))
        if home.split(".")[0] == "mmlearn":
            name = getattr(answer, "__qualname__", "the answer")
            raise AssertionError(
                f"{name} comes from {home}, so it earns nothing: write it yourself, and compare "
                "it with mmlearn's afterwards."
            )


def fingerprint(value: Any) -> dict | list | float | str:
    """Describe a value in a few numbers that are the same on every machine, as plain JSON.

    Up to 32 entries are kept whole. Of a larger tensor 32 entries spread over it are kept, with
    its mean, its root mean square and a mean weighted by position, which tells permutations apart.
    """
    if isinstance(value, (list, tuple)):
        return [fingerprint(item) for item in value]
    tensor = _tensor(value)
    if tensor is None:
        return {"text": str(value)} if isinstance(value, str) else {"type": type(value).__name__}
    if tensor.dim() == 0:
        return _round(float(tensor))
    flat = tensor.double().flatten()
    sample = flat
    if len(flat) > 32:
        sample = flat[torch.linspace(0, len(flat) - 1, 32).long()]
        position = torch.linspace(0, 1, len(flat), dtype=flat.dtype)
        moments = [flat.mean(), flat.square().mean().sqrt(), (flat * position).mean()]
        sample = torch.cat([sample, torch.stack(moments)])
    return {"shape": list(tensor.shape), "values": [_round(number) for number in sample.tolist()]}


@contextmanager
def recording() -> Iterator[list[tuple[str, Any]]]:
    """Inside, checks note the values that differ from what was wanted, and never fail."""
    global _recorded
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None


def _report(probe, print_of_got, otherwise, comparison):
    if _recorded is not None:
        _recorded.append((probe, print_of_got))
        return
    known = _known_mistakes(probe)
    says = {mistake["says"]: None for mistake in known if _alike(mistake["value"], print_of_got)}
    # Two mistakes may give the same value; three say that the value tells nothing.
    message = "\nOr: ".join(says) if 1 <= len(says) <= 2 else otherwise
    raise AssertionError(f"{message}\n  {comparison}")


def _known_mistakes(probe):
    try:
        mistakes = json.loads(FINGERPRINTS.read_text("utf-8"))["probes"].get(probe, [])
        return [{"value": m["value"], "says": str(m["says"])} for m in mistakes]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # missing or damaged: the plain message has to do


def _tensor(value):
    """A tensor for whatever holds numbers, detached and on the CPU; None for anything else."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, (bool, int, float)) or hasattr(value, "__array__"):
        return torch.as_tensor(value)
    return None


def _same(got, want, rtol, atol):
    if isinstance(want, (list, tuple)):
        alike = isinstance(got, (list, tuple)) and len(got) == len(want)
        return alike and all(_same(g, w, rtol, atol) for g, w in zip(got, want))
    mine, right = _tensor(got), _tensor(want)
    if mine is None or right is None:
        return type(got) is type(want) and got == want
    if mine.shape != right.shape or (mine.dtype == torch.bool) != (right.dtype == torch.bool):
        return False
    return torch.allclose(mine.double(), right.double(), rtol=rtol, atol=atol, equal_nan=True)


def _alike(known, mine):
    """Compare two fingerprints; numbers within 1e-4, ten times what float32 sums wander."""
    if isinstance(known, list):
        same_length = isinstance(mine, list) and len(known) == len(mine)
        return same_length and all(_alike(k, m) for k, m in zip(known, mine))
    if isinstance(known, dict):
        same_keys = isinstance(mine, dict) and known.keys() == mine.keys()
        return same_keys and all(_alike(known[key], mine[key]) for key in known)
    if isinstance(known, (int, float)) and isinstance(mine, (int, float)):
        return math.isclose(known, mine, rel_tol=1e-4, abs_tol=1e-5)
    return known == mine


def _round(number):
    """Six significant digits; what JSON has no number for becomes text."""
    return float(f"{number:.6g}") + 0.0 if math.isfinite(number) else str(number)


def _show(value):
    tensor = _tensor(value)
    if tensor is None:
        text = str(value)
        return text if len(text) < 200 else f"{text[:200]} ..."
    if tensor.dim() == 0:
        return f"{tensor.item():.6g}" if tensor.is_floating_point() else str(tensor.item())
    numbers = ", ".join(f"{number:.4g}" for number in tensor.double().flatten()[:8].tolist())
    more = ", ..." if tensor.numel() > 8 else ""
    return f"{numbers}{more} in shape {tuple(tensor.shape)}"
