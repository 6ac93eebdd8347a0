"""What the page of `dvc plots show` needs beside it to work without a network."""

from pathlib import Path

from stages.utils.files import atomic_write


def write_scripts(path: str | Path) -> None:
    """Write Vega, Vega-Lite and Vega-Embed as one script that sets them up in a page.

    The page's template (``.dvc/plots/page.html``) loads it from its own folder, and takes what DVC
    would load from the network where it is missing.
    """
    import vl_convert

    with atomic_write(path) as tmp:
        script = vl_convert.javascript_bundle()
        tmp.write_text(script, encoding="utf-8", newline="\n")
