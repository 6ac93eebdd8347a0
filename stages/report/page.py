"""The scripts that let the page of `dvc plots show` work offline."""

import shutil
from importlib.metadata import version
from pathlib import Path

from stages.run.files import atomic_write, scratch_dir


def write_scripts(path: str | Path) -> None:
    """Write Vega, Vega-Lite and Vega-Embed as one script.

    The template of the page (``.dvc/plots/page.html``) loads it from the folder of the page. Where
    it is missing, the page loads what DVC's own page would from the network. Bundling takes more
    than a second, so the script is kept in the scratch folder.
    """
    kept = scratch_dir("page") / f"vega-{version('vl-convert-python')}.js"
    if not kept.exists():
        import vl_convert

        with atomic_write(kept) as tmp:
            script = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub is wrong
            tmp.write_text(script, encoding="utf-8", newline="\n")
    with atomic_write(path) as tmp:
        shutil.copyfile(kept, tmp)
