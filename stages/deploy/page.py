"""The page that classifies photographs in a browser, as one file that needs no network."""

import base64
import gzip
import json
from pathlib import Path

from stages.data.arrays import ImageSpec
from stages.run.cli import UserError

RUNTIME = "onnxruntime-web@1.30.0"  # of npm
_TEMPLATE = Path(__file__).with_name("index.html")
_SCRIPT, _WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"


def write_page(
    path: str | Path,
    model: str | Path,
    spec: ImageSpec,
    runtime: str | Path,
    threshold: float = 0.0,
) -> None:
    """Write the page: the template with the model and ONNX Runtime Web inside.

    Parameters
    ----------
    path : path
    model : path
        The ONNX file.
    spec : ImageSpec
    runtime : path
        The npm package onnxruntime-web, installed.
    threshold : float, default=0.0
        Predictions of a lower confidence are marked as unsure.

    Raises
    ------
    UserError
        If this is not the version of the package that the page was written for.
    """
    package = json.loads((Path(runtime) / "package.json").read_text(encoding="utf-8"))
    installed = f"{package['name']}@{package['version']}"
    if installed != RUNTIME:
        raise UserError(f"{runtime}: expected {RUNTIME}, found {installed}")
    page = _TEMPLATE.read_text(encoding="utf-8")
    text = spec.to_json().replace("<", "\\u003c")  # a class name can't end the script
    for place, content in (
        ("/*spec*/null", text),
        ("/*threshold*/0", str(threshold)),
        ("/*runtime*/", _pack(Path(runtime) / "dist" / _SCRIPT)),
        ("/*wasm*/", _pack(Path(runtime) / "dist" / _WASM)),
        ("/*model*/", _pack(Path(model))),
    ):
        page = page.replace(place, content, 1)
    Path(path).write_text(page, encoding="utf-8", newline="\n")


def _pack(path: Path) -> str:
    """Return a file as a gzip stream in base64."""
    return base64.b64encode(gzip.compress(path.read_bytes(), mtime=0)).decode()
