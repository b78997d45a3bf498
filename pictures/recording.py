"""A recording for the Rerun viewer (https://rerun.io): the frames of a scene over time, with labels and predictions.

Needs `pip install rerun-sdk` (MIT or Apache 2.0). The viewer shows pictures, class maps, depth, boxes, steering angles
over time, and the labelled depth points in 3-D, in the camera's coordinates (x forward, y left, z up, metres).
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from a2d2.dataset import FrameDataset
from a2d2.frames import Frame
from a2d2.images import whole_path
from experiment import Data, Source
from scoring.bootstrap import read_times
from tasks.task import Task


def write_recording(
    path: Path,
    frames: Sequence[Frame],
    data: Data,
    sources: Mapping[str, Source],
    predict: Callable[[Source, Frame], Mapping[str, Any]],
) -> int:
    """Write the frames, whole or not at all; returns their number. ValueError if the package is not installed."""
    try:
        import rerun
    except ImportError as error:
        raise ValueError("recordings need Rerun, which is not installed: pip install rerun-sdk") from error
    tasks: dict[str, Task] = {name: task for source in sources.values() for name, task in source.tasks.items()}
    dataset = FrameDataset(frames, data.roots, tasks, size=data.size)
    times = read_times(frames)
    recording = rerun.RecordingStream("asymmetric-multitask")
    with whole_path(path) as temporary:
        recording.save(str(temporary))
        recording.log("world", rerun.ViewCoordinates.FLU, static=True)
        for number, frame in enumerate(tqdm(frames, desc="record", unit="frame")):
            recording.set_time("frame", sequence=number)
            if times[number] is not None:
                recording.set_time("recorded", timestamp=times[number])
            sample = dataset[number]
            recording.log("camera/image", rerun.Image(sample["image"].permute(1, 2, 0).numpy()).compress())
            camera = sample["camera"].numpy() if sample["camera"].isfinite().all() else None
            for name, target in sample["targets"].items():
                for entity, archetype in tasks[name].record(target=target, camera=camera):
                    recording.log([*entity.split("/"), "ground_truth"], archetype)
            for run, source in sources.items():
                for name, prediction in predict(source, frame).items():
                    for entity, archetype in source.tasks[name].record(prediction=prediction):
                        recording.log([*entity.split("/"), run], archetype)
        recording.flush()
        recording.disconnect()
    return len(frames)
