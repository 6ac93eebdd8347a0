"""Replicas: processes that train one network together, each on its share of every batch."""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from stages.run.cli import UserError, first_line, list_names
from stages.run.launch import LOST

_LOST = tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError


class Replicas:
    """All replicas of a training, seen from one of them.

    Each replica is a process with one device, and TF_CONFIG tells it the addresses of all and its
    own number, from 0. All start from equal weights and apply equal gradients, the means over all,
    so their weights stay equal: they are ordinary variables, and only numbers are exchanged.
    A single one needs no TF_CONFIG and exchanges nothing.
    """

    def __init__(self, count: int = 1) -> None:
        self.count, self.number = count, 0
        if count > 1:
            if "TF_CONFIG" not in os.environ:
                raise UserError(
                    f"params.yaml: train.replicas: {count} are as many processes, and this is one;"
                    " `dvc repro` starts them, or start each yourself, with TF_CONFIG set: python"
                    " -m stages train --replica"
                )
            # Of several GPUs, each process uses the first that it sees.
            tf.config.set_visible_devices(tf.config.list_physical_devices("GPU")[:1], "GPU")
            try:
                self._strategy = tf.distribute.MultiWorkerMirroredStrategy()
            except (tf.errors.OpError, ValueError) as error:
                raise UserError(
                    "params.yaml: train.replicas: this replica can't connect to the others"
                    f" ({first_line(error)}); open the ports between the machines, see that"
                    " TF_CONFIG is complete, and run again"
                ) from None
            resolver = self._strategy.cluster_resolver
            chiefs = resolver.cluster_spec().as_dict().get("chief", [])  # platforms may name one
            self.number = resolver.task_id + (len(chiefs) if resolver.task_type == "worker" else 0)
            found = self._strategy.num_replicas_in_sync
            if found != count:
                raise UserError(
                    f"params.yaml: train.replicas: expected {count} processes, found {found} in"
                    " TF_CONFIG"
                )

    def __enter__(self) -> "Replicas":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if self.count > 1 and isinstance(error, _LOST):
            raise UserError(LOST) from None

    @property
    def is_first(self) -> bool:
        """Whether this is the replica that validates, writes the files and prints."""
        return self.number == 0

    def share(self, rows: np.ndarray) -> np.ndarray:
        """Return this replica's part of a batch, whose size is a multiple of `count`."""
        return np.split(rows, self.count)[self.number]

    def mean(self, tensors: Sequence[tf.Tensor]) -> Sequence[tf.Tensor]:
        """Return the mean over all replicas of each tensor, in one exchange; all of one dtype."""
        if self.count == 1 or not tensors:
            return tensors
        flat = tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], axis=0)
        flat = self._strategy.reduce("MEAN", flat, axis=None)
        parts = tf.split(flat, [tensor.shape.num_elements() for tensor in tensors])
        return [tf.reshape(part, x.shape) for part, x in zip(parts, tensors, strict=True)]

    def gather(self, values: Sequence[float]) -> np.ndarray:
        """Return the values of all replicas: float64 [count, n]."""
        table = np.zeros((self.count, len(values)))
        table[self.number] = values
        if self.count > 1:
            table = self._strategy.reduce("SUM", tf.constant(table), axis=None).numpy()
        return table

    @contextlib.contextmanager
    def first_before_others(self) -> Iterator[None]:
        """Let the first replica run a block before all others."""
        if not self.is_first:
            self.gather([0])
        yield
        if self.is_first:
            self.gather([0])

    def require_equal(self, what: str, value: Any) -> None:
        """Raise a UserError if a value, which can be represented as text, differs among them."""
        rows = self.gather(list(hashlib.sha256(repr(value).encode()).digest()))
        if others := np.flatnonzero((rows != rows[0]).any(1)).tolist():
            raise UserError(
                f"params.yaml: train.replicas: not the same {what} in replica 1 and in replica"
                f" {list_names([str(number + 1) for number in others])}; all need equal machines"
                " and packages, and must see the same folder"
            )
