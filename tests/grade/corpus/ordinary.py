"""Right, wrong and half right: exactly the points earned, check by check."""

from .kit import FULL, NOTHING, ONLY_MEAN, ONLY_SOFTMAX, WRONG, as_bytes, collector

CASES, case = collector("right, wrong, half right")

# The checks of w03_clip, in order: similarity, contrastive_loss, read_end, image_tower,
# sigmoid_loss, tiled_logsumexp.
CLIP = (2, 1, 2, 1, 1, 1, 2, 1, 2, 1, 1, 2, 1, 2, 1, 1)
LOSS = slice(2, 6)  # of contrastive_loss


def clip_with_loss(*points):
    return (*CLIP[: LOSS.start], *points, *CLIP[LOSS.stop :])


@case(FULL)
def right(kit):
    """All answers are the course's own."""
    return kit.hand_in()


@case(NOTHING, "^not answered yet")
def untouched(kit):
    """The notebook as it was released."""
    return as_bytes(kit.released())


@case(ONLY_MEAN, WRONG)
def wrong_axis(kit):
    return kit.hand_in(softmax=kit.wrong("softmax", "wrong_axis"))


@case((2.0, 0.0, 2.0), "^it must hold: survives scores of a thousand$")
def overflows(kit):
    """One check of two is lost, the other is not."""
    return kit.hand_in(softmax=kit.wrong("softmax", "overflows"))


@case(ONLY_SOFTMAX, "^After 1, 2 and 6")
def half_right(kit):
    return kit.hand_in(running_mean=kit.wrong("running_mean", "last_value"))


@case(ONLY_MEAN, "^the answer raised TypeError: scores are odd$")
def raises_an_error(kit):
    return kit.hand_in(softmax="def softmax(scores):\n    raise TypeError('scores are odd')")


@case(ONLY_MEAN, "^the answer cell stopped with SyntaxError")
def does_not_parse(kit):
    return kit.hand_in(softmax="def softmax(scores:\n    return scores")


@case(ONLY_MEAN, "^the answer cell stopped with ZeroDivisionError")
def stops_above_its_definition(kit):
    return kit.hand_in(softmax="1 / 0\n\ndef softmax(scores):\n    return scores")


@case(ONLY_MEAN, "^softmax is not defined$")
def another_name(kit):
    return kit.hand_in(softmax=kit.solution("softmax").replace("def softmax", "def soft_max"))


@case(ONLY_MEAN, WRONG)
def right_once(kit):
    """Right at the first call and wrong at every later one."""
    return kit.hand_in(
        softmax="""
        calls = []

        def softmax(scores):
            calls.append(1)
            return torch.softmax(scores, dim=-1) if len(calls) == 1 else scores
        """
    )


@case(FULL)
def a_later_cell_takes_the_name(kit):
    """What counts is what the name meant at its checks."""
    return kit.hand_in(last="softmax = RunningMean = None")


@case(CLIP, week="w03_clip")
def clip_right(kit):
    """Tensors, modules and gradients of a real week."""
    return kit.hand_in(week="w03_clip")


@case(clip_with_loss(2, 1, 1, 0), "grad", week="w03_clip")
def clip_without_a_gradient(kit):
    """The right value, cut off from its inputs."""
    return kit.hand_in(
        week="w03_clip",
        contrastive_loss="""
        def contrastive_loss(logits_NN):
            pairs = torch.arange(len(logits_NN))
            rows, columns = logits_NN.detach(), logits_NN.detach().T
            return (F.cross_entropy(rows, pairs) + F.cross_entropy(columns, pairs)) / 2
        """,
    )


@case((*CLIP[:6], 2, 0, *CLIP[8:]), "must raise a ValueError", week="w03_clip")
def clip_refuses_nothing(kit):
    return kit.hand_in(
        week="w03_clip",
        read_end="""
        def read_end(states_BLD, input_ids_BL, eos_token_id):
            first = (input_ids_BL == eos_token_id).int().argmax(dim=1)
            return states_BLD[torch.arange(len(first)), first]
        """,
    )


@case(
    clip_with_loss(0, 0, 0, 0),
    "^The answer to contrastive_loss is taken from mmlearn",
    week="w03_clip",
)
def clip_taken_from_mmlearn(kit):
    """The course's own function under another module's name."""
    return kit.hand_in(
        week="w03_clip",
        contrastive_loss="""
        from mmlearn.contrastive import contrastive_loss
        contrastive_loss.__module__ = "__main__"
        """,
    )
