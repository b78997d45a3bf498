"""What can only be tested on a GPU; `make gpu` runs it. Without one everything here is skipped."""

import math
import warnings

import pytest
import torch
from tiny_run import read_log, run_train

from a2d2.dataset import FrameDataset
from training.loading import load_batches, send_ahead
from training.updates import CycleUpdate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
FAST = ("data.split=all", "train.steps=6", "train.log_every=1")


@pytest.mark.parametrize("method", ["sum", "uncertainty", "mgda", "gradvac"])
def test_a_run_on_the_gpu_is_near_the_one_on_the_cpu(config, tmp_path, method):
    options = [*FAST, f"balancing.method={method}", "train.precision=fp32"]
    logs = {}
    for device in ("cpu", "cuda"):
        with pytest.MonkeyPatch.context() as patch:
            assert run_train(patch, config, tmp_path / device, *options, f"train.device={device}") == 0
        logs[device] = [line for line in read_log(tmp_path / device) if line["kind"] == "train"]
    for ours, theirs in zip(logs["cuda"], logs["cpu"], strict=True):
        for key, value in theirs.items():
            if key.startswith("loss/"):
                assert ours[key] == pytest.approx(value, rel=0.05), (ours["step"], key)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains(config, tmp_path, precision):
    with pytest.MonkeyPatch.context() as patch:
        assert run_train(patch, config, tmp_path / "run", *FAST, f"train.precision={precision}") == 0
    losses = [value for line in read_log(tmp_path / "run") for key, value in line.items() if key.startswith("loss/")]
    assert losses and all(map(math.isfinite, losses))


def test_the_host_waits_once_in_a_step(config, tmp_path):
    """Counted by PyTorch itself, whose warnings name each place that waits. The first step is left out: it also makes
    the optimizer's means and loads what the GPU runs."""
    waits: list[list[str]] = []
    with pytest.MonkeyPatch.context() as patch:
        step = CycleUpdate.step

        def watched(self, *arguments):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    return step(self, *arguments)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                    found = [each for each in caught if "called a synchronizing" in str(each.message)]
                    waits.append([f"{each.filename}:{each.lineno}" for each in found])

        patch.setattr(CycleUpdate, "step", watched)
        assert run_train(patch, config, tmp_path / "run", *FAST) == 0
    assert len(waits) == 6 and all(len(places) <= 1 for places in waits[1:]), waits


def test_cycles_that_are_sent_ahead_are_the_same():
    class Numbers(FrameDataset):
        def __init__(self):
            self.values = torch.arange(64).float()

        def __len__(self):
            return 64

        def __getitem__(self, key):
            return self.values[key].expand(1000)

        def collate(self, samples):
            return {"image": torch.stack(samples), "targets": {"a": torch.stack(samples) + 1}, "rows": {}}

    device = torch.device("cuda")
    batches = load_batches(Numbers(), 0, device, batch_size=4)
    seen = 0
    for number, (batch,) in enumerate(send_ahead(([batch] for batch in batches), device)):
        assert batch["image"].is_cuda and batch["image"][:, 0].tolist() == [4.0 * number + row for row in range(4)]
        assert torch.equal(batch["targets"]["a"], batch["image"] + 1)
        seen += 1
    assert seen == 16
