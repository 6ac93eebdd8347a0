"""Lines on images that were read, but may look different to the network than to a person."""

from collections.abc import Sequence

import numpy as np

from stages.data.images import Note
from stages.run import cli

_SCALE = "save them on the scale of the training images"
_TEXTS = {  # a name, and what follows the number of images
    Note.TRANSPARENT: ("transparent", "with transparent parts, which become white"),
    Note.PLAIN: ("plain", "of one plain shade at this size"),
    Note.DARK: (
        "WARNING: almost black",
        "of more than 8 bits per channel with no value above a quarter of {white}, which is white"
        f" to this model; {_SCALE}",
    ),
    Note.CLIPPED: (
        "WARNING: clipped",
        "of more than 8 bits per channel with values above {white}, which is white to this model;"
        f" {_SCALE}",
    ),
    Note.FIRST: (
        "only the first",
        "with several pages, frames or groups of bands, of which only the first is read",
    ),
    Note.OTHER_COLOR: (
        "colors",
        "whose colors are defined by gamma or code points (such as Display P3, BT.2020, PQ, HLG):"
        " they are read as sRGB, but browsers convert them; convert all to sRGB",
    ),
}


def note_lines(notes: np.ndarray, paths: Sequence[str], white_level: int) -> dict[str, str]:
    """Return a line for each kind of note: how many images have it, and the first of them.

    Parameters
    ----------
    notes : int array
        Of each image, as `images.Note`.
    paths : sequence of str
    white_level : int
        Of the model.
    """
    lines = {}
    for note, (name, text) in _TEXTS.items():
        rows = np.flatnonzero(notes & note)
        if len(rows):
            first = cli.list_names([paths[rows[0]]])
            what = f"{cli.count(len(rows), 'image')} {text.format(white=white_level)}"
            lines[name] = f"{what} ({'the first: ' if len(rows) > 1 else ''}{first})"
    return lines
