"""The page on which a person reviews what an audit found, as one file that needs no network."""

import base64
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from stages.run.files import atomic_write

MAX_FINDINGS = 1000  # of a kind
MAX_BYTES = 30_000_000
LEFT_OUT = "left out"
_TEMPLATE = Path(__file__).with_name("page.html")
_LARGE, _SMALL = 320, 160  # pixels of the long side: the image itself, and typical ones beside it
_QUALITY = 75


def write_page(
    path: str | Path,
    findings: pd.DataFrame,
    images: Callable[[str], Image.Image],
    classes: Sequence[str],
    typical: Mapping[str, Sequence[str]],
    notes: Sequence[str],
    dataset: str,
    max_bytes: int = MAX_BYTES,
) -> dict[str, int]:
    """Write the page that shows images one by one and saves the decisions about them.

    Of each kind it takes the worst `MAX_FINDINGS`; of these the worst of each kind, then the second
    of each, until the page is full.

    Parameters
    ----------
    path : path
    findings : DataFrame
        In the order of the review, with the str columns path, kind, label, suggestion, digest and
        other, empty where there is none, and the float column score. The findings of an image are
        shown together; of files with one digest, those of the first. The class of `other` is that
        of its finding's suggestion, or else the label.
    images : function
        For a path an RGB image, upright and whole.
    classes : sequence of str
        All classes; the first ones can be chosen by a key.
    typical : mapping
        For a class the paths of a few of its images.
    notes : sequence of str
        Sentences for the top of the page.
    dataset : str
        Its name.
    max_bytes : int
        The page stays below it.

    Returns
    -------
    shown : dict
        For each kind, the number of images on the page; under "left out", the number of images with
        findings that are not on it.
    """
    findings = findings[findings["path"] == findings.groupby("digest")["path"].transform("first")]
    rank = findings.groupby("kind")["score"].rank(method="first", ascending=False)
    findings = findings.assign(rank=rank)
    worst = findings[findings["rank"] <= MAX_FINDINGS]
    rows: dict[str, list[dict[Any, Any]]] = {}
    for row in worst.to_dict("records"):
        rows.setdefault(row["digest"], []).append(row)

    data: dict[str, Any] = {
        "dataset": dataset,
        "classes": list(classes),
        "notes": list(notes),
        "left_out": findings["digest"].nunique(),
    }
    template = _TEMPLATE.read_text(encoding="utf-8")
    size = len(template.encode()) + len(_json(data)) + 200  # the keys that follow
    chosen: dict[str, dict[str, Any]] = {}
    large: dict[str, str] = {}
    small: dict[str, list[str]] = {}
    for digest in worst.sort_values("rank", kind="stable")["digest"].unique():
        image = _describe(rows[digest])
        others = [finding["other"] for finding in image["findings"] if finding["other"]]
        new_large = {
            name: _encode(images(name), _LARGE)
            for name in dict.fromkeys([image["path"], *others])
            if name not in large
        }
        new_small = {
            name: [_encode(images(example), _SMALL) for example in typical.get(name, ())]
            for name in dict.fromkeys([image["label"], image["suggestion"]])
            if name and name not in small
        }
        size += len(_json([image, new_large, new_small]))
        if size > max_bytes:
            break
        chosen[digest] = image
        large |= new_large
        small |= new_small

    data["left_out"] -= len(chosen)
    data["images"] = [chosen[digest] for digest in rows if digest in chosen]
    data["audit"] = hashlib.sha256(_json(data["images"]).encode()).hexdigest()
    text = template.replace("{}", _json({**data, "large": large, "typical": small}), 1)
    script = template.partition("<script>")[2].partition("</script>")[0].encode()
    only = base64.b64encode(hashlib.sha256(script).digest()).decode()
    with atomic_write(path) as tmp:
        page = text.replace("'script'", f"'sha256-{only}'", 1)
        tmp.write_text(page, encoding="utf-8", newline="\n")
    shown = worst[worst["digest"].isin(chosen)].groupby("kind", sort=False)["digest"].nunique()
    return {**{str(kind): count for kind, count in shown.items()}, LEFT_OUT: data["left_out"]}


def _describe(rows: Sequence[Mapping[Any, Any]]) -> dict[str, Any]:
    """Join the findings of one image."""
    first = rows[0]
    suggestions = [row["suggestion"] for row in rows if row["suggestion"]]
    return {
        **{key: first[key] for key in ("digest", "path", "label")},
        "suggestion": suggestions[0] if suggestions else "",
        "findings": [{key: row[key] for key in ("kind", "suggestion", "other")} for row in rows],
    }


def _encode(image: Image.Image, side: int) -> str:
    """Shrink an image to a data URL."""
    image = image.copy()
    image.thumbnail((side, side))
    kind = "JPEG" if max(image.size) > 64 else "PNG"  # few pixels, each of which counts
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=_QUALITY, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _json(value: Any) -> str:
    """Return ASCII that can't end the element of HTML in which it is."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
