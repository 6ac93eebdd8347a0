"""Classify photographs: python classify.py PHOTO_OR_FOLDER ...

Prints a JSON list with an entry for each image. Needs `pip install -r requirements.txt`; what the
model expects is written in model.onnx itself, and stages/ reads images as in training.
"""

import json
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from stages.data.images import ImageError, read_image
from stages.data.listing import NO_IMAGE, list_images

MODEL = Path(__file__).resolve().with_name("model.onnx")


def main() -> int:
    options = onnxruntime.SessionOptions()
    # Threads that wait for work without rest, while an image is read, cost as much as the network.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(MODEL), options, providers=["CPUExecutionProvider"])
    spec: Any = SimpleNamespace(
        **json.loads(session.get_modelmeta().custom_metadata_map["image_spec"])
    )
    entries = []
    for path in map(Path, sys.argv[1:]):
        found, skipped = list_images(path) if path.is_dir() else ([(path, "")], [])
        if missed := [one for one in skipped if one.reason != NO_IMAGE]:
            number, names = sum(one.files for one in missed), [ascii(one.path) for one in missed]
            where = "in folders of a system, or not here"
            print(f"passed over: {number} images {where}:", *names, file=sys.stderr)
        for file, reason in found:
            try:
                if reason:
                    raise ImageError(reason)
                image, _ = read_image(file, spec)
            except ImageError as error:
                entries.append({"path": str(file), "error": str(error)})
                continue
            (row,) = session.run(["probabilities"], {"images": image[np.newaxis]})[0]
            ranked = [int(n) for n in np.argsort(-row, kind="stable")]
            entry = {"path": str(file), "predicted": spec.classes[ranked[0]]}
            shares = {spec.classes[n]: round(float(row[n]), 6) for n in ranked}
            entries.append(entry | {"probabilities": shares})
    text = json.dumps(entries, indent=2, ensure_ascii=False) + "\n"
    sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))  # whatever the locale says
    return int(not entries or any("error" in entry for entry in entries))


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # Pillow's, about damaged files, which are in the list
    sys.exit(main() if len(sys.argv) > 1 else __doc__)
