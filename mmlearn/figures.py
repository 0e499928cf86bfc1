"""Figures that say in words what they show, in colours that everyone can tell apart.

matplotlib draws, in the notebook; here is what each notebook would otherwise repeat. Let `show` be
the last line of a cell: like any value there, it is displayed, and nowhere else.
"""

import base64
import html
import io

__all__ = [
    "BLUE",
    "GREEN",
    "GREY",
    "ORANGE",
    "PURPLE",
    "RED",
    "SKY",
    "Picture",
    "set_style",
    "show",
]

# Okabe and Ito 2008: told apart with any kind of colour vision.
BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
SKY, PURPLE, GREY = "#56B4E9", "#CC79A7", "#666666"


def set_style():
    """Let all figures of this process look like the course's: quiet frames, small print."""
    from matplotlib import pyplot

    pyplot.rcParams |= {"figure.dpi": 110, "font.size": 9, "axes.titlesize": 10}
    pyplot.rcParams |= {"legend.frameon": False, "figure.titlesize": 11}
    pyplot.rcParams |= {"axes.spines.top": False, "axes.spines.right": False}


class Picture:
    """A finished figure and its description: what a notebook displays, and a slide takes over."""

    def __init__(self, png: bytes, alt: str, name: str):
        self.png, self.alt, self.name = png, alt, name

    def __repr__(self):
        return f"Picture({self.name}: {self.alt})"

    def _repr_mimebundle_(self, include=None, exclude=None):
        code = base64.b64encode(self.png).decode()
        # JupyterLab and the exporters read the description of an HTML image, not of a bare PNG.
        image = f'<img alt="{html.escape(self.alt)}" src="data:image/png;base64,{code}">'
        bundle = {"text/html": image, "image/png": code, "text/plain": self.alt}
        return bundle, {"image/png": {"alt": self.alt, "name": self.name}}


def show(figure, name: str, alt: str) -> Picture:
    """Close a matplotlib figure and return its picture, to stand at the end of a cell.

    `name`, a word or two, is how the week's slides call it. `alt` says what is to be seen to those
    who cannot see it.
    Raises: ValueError, for a name that no file could have, or an empty description.
    """
    from matplotlib import pyplot

    if not name.replace("_", "").isalnum():
        raise ValueError(f"name is {name!r}; wanted letters, digits and underscores")
    alt = " ".join(alt.split())
    if not alt:
        raise ValueError(f"figure {name!r} has no alt text: say what there is to be seen in it")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", bbox_inches="tight")
    pyplot.close(figure)
    return Picture(picture.getvalue(), alt, name)
