"""Several runs side by side in one process: those that wait for the same batch share one pass of the teacher."""

from collections.abc import Callable, Sequence

from errors import Stopped, UserError
from helper.distributed import count_processes
from helper.stage_training import TeacherRequest, random_state, set_random_state
from models.backbone import Output


class _Strand:
    """A run between two of its requests to the teacher."""

    def __init__(self, run, alone: bool):
        self.name, self._steps, self._alone = run.folder.label.strip(" []"), run.execute(), alone
        self._random = None if alone else random_state()
        self.request: TeacherRequest | None = None  # None: the run is over, with a `result` or an `error`
        self.result: dict | None = None
        self.error: Exception | None = None

    def advance(self, teacher_output: Output | None) -> None:
        """Go on to the next request; the run has the random generators to itself."""
        if not self._alone:
            set_random_state(self._random)
        try:
            self.request = self._steps.send(teacher_output)
        except StopIteration as end:
            self.request, self.result = None, end.value
        except (Stopped, UserError) as error:
            if isinstance(error, UserError) and count_processes() > 1:
                raise  # this process may be the only one: it cannot leave the run and go on with the others
            self.request, self.error = None, error
        if not self._alone:
            self._random = random_state()


def execute_together(runs: Sequence, teach: Callable[..., Output]) -> list[dict]:
    """Run `run.execute()` of every run to its end, the one furthest behind first; `teach(images, preact, is_whole)`
    answers them.

    A run's numbers do not depend on the others. One that fails does not stop the others; its error is raised when they
    are over.
    """
    strands = [_Strand(run, alone=len(runs) == 1) for run in runs]
    for strand in strands:
        strand.advance(None)
    while waiting := [strand for strand in strands if strand.request is not None]:
        behind = min(strand.request.position for strand in waiting)
        outputs: dict[tuple, Output] = {}
        for strand in waiting:
            request = strand.request
            if request.position != behind:
                continue
            key = (request.batch_key, request.preact)
            if key not in outputs:
                outputs[key] = teach(request.images, request.preact, request.is_whole)
            strand.advance(outputs[key])
    _raise_first_error(strands)
    return [strand.result for strand in strands]


def _raise_first_error(strands: Sequence[_Strand]) -> None:
    failed = [strand for strand in strands if strand.error is not None]
    failed.sort(key=lambda strand: not isinstance(strand.error, Stopped))
    if not failed:
        return
    if len(strands) == 1 or isinstance(failed[0].error, Stopped):
        raise failed[0].error
    raise UserError("; ".join(f"{strand.name}: {strand.error}" for strand in failed))
