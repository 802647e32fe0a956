"""What a model must not be worse than: the last audit of another run.

Enters: a `Run` that training ended well. Leaves: a `Baseline`; its images are read when they are asked for.

NumPy is imported only where images are compared: the gate imports this module and must start in a blink.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict

from bias_audit.records.errors import RecordError
from bias_audit.records.runs import Run
from bias_audit.terms import Estimate, Subjects

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from bias_audit.gate.columns import SampleColumns


class About(BaseModel):
    """Of which run, model, data and audit a baseline is."""

    model_config: ClassVar[ConfigDict] = ConfigDict(extra="forbid", frozen=True)

    run_id: str
    tool: str
    model: str
    layer: str
    methods: tuple[str, ...]
    target: str
    sign: str
    subjects: Subjects
    fingerprint: str
    samples_audited: int
    seed: int
    step: int
    weights: str
    audited: str


@dataclass(frozen=True)
class BaselineSamples:
    """The baseline's images: class indices `(N,)`, attribute values as text `(N, A)`, and what each adds to what."""

    labels: npt.NDArray[np.int64]
    attributes: npt.NDArray[np.str_]
    columns: SampleColumns


@dataclass(frozen=True)
class Baseline:
    """An audit that later ones are compared with; `source` is the path it was read from."""

    source: Path
    about: About
    estimates: tuple[Estimate, ...]
    _samples: Callable[[], BaselineSamples]

    @cached_property
    def samples(self) -> BaselineSamples:
        """Its images.

        Raises:
            RecordError: they cannot be read.
        """
        return self._samples()

    @classmethod
    def of_run(cls, run: Run) -> Baseline:
        """The last audit of a trained model in a run that ended well. Whether it holds any policy is not asked.

        Raises:
            RecordError: training broke off or goes on, the last record was cut off, an audit failed, or there is none
                of a trained model.
        """
        wrong = list(run.unfinished)
        last = run.trained[-1:]
        wrong += [part for index in last if (part := run.partial(index))]
        if not any(e.measured for index in last for e in run.audits[index].estimates):
            wrong.append("no audit of a trained model measured anything")
        if wrong:
            raise RecordError(f"{run.path}: cannot be a baseline: {wrong[0]}")
        (index,) = last
        audit = run.audits[index]
        kept = {name: getattr(run.manifest, name) for name in About.model_fields if hasattr(run.manifest, name)}
        about = About(**kept, step=audit.step, weights=audit.weights, audited=audit.created)
        return cls(run.path, about, audit.estimates, partial(_samples_of_run, run, index))


def _samples_of_run(run: Run, index: int) -> BaselineSamples:
    import numpy as np

    from bias_audit.gate.columns import SampleColumns

    table, columns = run.sample_table(), SampleColumns.of_run(run, index)
    place = {name: i for i, name in enumerate(table.ids)}
    if not all(name in place for name in columns.ids):
        raise RecordError(f"{run.path}: its audit is of images that samples.npz does not have: record the run again")
    rows = np.array([place[name] for name in columns.ids], dtype=np.int64)
    return BaselineSamples(table.labels[rows], table.attributes[rows], columns)
