"""All tasks there are. To add one, write its file and put it here."""

from tasks.depth import Depth
from tasks.detection import Detection
from tasks.segmentation import Segmentation
from tasks.steering import Steering
from tasks.task import Task

TASKS: dict[str, type[Task]] = {task.name: task for task in (Segmentation, Depth, Detection, Steering)}
