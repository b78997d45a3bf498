"""All tasks there are. To add one, write its options and its file, and put it here.

`tasks.TASKS` loads them, and PyTorch with them, when it is first asked for; `tasks.options` does not.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tasks.task import Task

    TASKS: dict[str, type[Task]]


def __getattr__(name: str) -> object:
    if name != "TASKS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from tasks.depth import Depth
    from tasks.detection import Detection
    from tasks.segmentation import Segmentation
    from tasks.steering import Steering

    tasks = {task.name: task for task in (Segmentation, Depth, Detection, Steering)}
    globals()["TASKS"] = tasks
    return tasks
