"""mmlearn.figures: what a notebook shows is closed, described and named."""

import base64

import matplotlib.pyplot as plt
import pytest
from IPython.core.formatters import DisplayFormatter

from mmlearn.figures import show


@pytest.fixture
def figure():
    figure, axis = plt.subplots(figsize=(1, 1))
    axis.plot([0, 1])
    yield figure
    plt.close(figure)


def test_a_notebook_shows_the_picture_with_its_description(figure):
    bundle, metadata = DisplayFormatter().format(show(figure, "line", 'A line\n "rises".'))
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    assert bundle["text/plain"] == 'A line "rises".'
    assert 'alt="A line &quot;rises&quot;."' in bundle["text/html"]
    assert metadata["image/png"] == {"alt": 'A line "rises".', "name": "line"}


def test_a_shown_figure_is_closed_so_that_a_notebook_does_not_show_it_twice(figure):
    show(figure, "line", "A line rises.")
    assert not plt.fignum_exists(figure.number)


@pytest.mark.parametrize("name", ["", "two words", "../up", "a.png"])
def test_a_name_that_is_no_word_is_refused(figure, name):
    with pytest.raises(ValueError, match="wanted letters"):
        show(figure, name, "A line rises.")


def test_a_figure_without_a_description_is_refused(figure):
    with pytest.raises(ValueError, match="'line' has no alt text"):
        show(figure, "line", " \n ")
