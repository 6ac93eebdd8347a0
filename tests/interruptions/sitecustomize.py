"""Strikes a stage at a named moment. Python runs this module at its start where it is on the path.

The moment is told by audit events, so no code of the pipeline knows of it. Variables:

INTERRUPT
    ``MOMENT TARGET``: see `MOMENTS`; the target is ``group`` (dvc and all below it) or ``dvc``
    alone, killed with SIGKILL. Then the stage takes a minute for what it does next.
FILE_LIMIT
    ``STAGE BYTES``: no file of this stage may grow larger, as on a full disk.
LIST_BACKWARDS
    If set, directories are listed in an unusual order.
"""

import os
import re
import signal
import sys
import time

_SAVED = ("os.rename", r"checkpoints/.*\.npz$")

# For each moment: the stage, and the events to come one after another.
MOMENTS = {
    "prepare": ("prepare", [("os.rename", r"data/prepared/val$")]),
    "between epochs": ("train", [_SAVED, _SAVED, ("open", r"checkpoints$")]),
}


def _strike_at(events: list[tuple[str, str]], target: str) -> None:
    waiting = [(name, re.compile(path)) for name, path in events]

    def hook(event: str, arguments: tuple) -> None:
        if not waiting or event != waiting[0][0]:
            return
        path = arguments[0] if event == "open" else arguments[1]
        if isinstance(path, int) or not waiting[0][1].search(os.fsdecode(path)):
            return
        waiting.pop(0)
        if not waiting:
            _strike(target)

    sys.addaudithook(hook)


def _strike(target: str) -> None:
    if target == "group":
        os.killpg(os.getpgrp(), signal.SIGKILL)
    else:
        os.kill(os.getpgrp(), signal.SIGKILL)  # dvc leads the group
        time.sleep(60)


def _main() -> None:
    words = getattr(sys, "orig_argv", [])
    stage = words[3] if words[1:3] == ["-m", "stages"] else ""
    if moment := os.environ.get("INTERRUPT"):
        name, target = moment.rsplit(" ", 1)
        if MOMENTS[name][0] == stage:
            _strike_at(*MOMENTS[name][1:], target)
    limit = os.environ.get("FILE_LIMIT", "").split()
    if limit and limit[0] == stage:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit[1]), int(limit[1])))
    if stage and os.environ.get("LIST_BACKWARDS"):
        listdir, scandir = os.listdir, os.scandir

        class Backwards(list):
            def __enter__(self) -> "Backwards":
                return self

            def __exit__(self, *_: object) -> None:
                self.clear()

            def __next__(self) -> os.DirEntry:
                if not self:
                    raise StopIteration
                return self.pop()

            def __iter__(self) -> "Backwards":
                return self

            def close(self) -> None:
                self.clear()

        def backwards(path: object = ".") -> Backwards:
            with scandir(path) as entries:
                return Backwards(sorted(entries, key=lambda entry: entry.name))

        os.listdir = lambda path=".": sorted(listdir(path), reverse=True)
        os.scandir = backwards


_main()
