"""The shared encoder: any timm network that offers feature maps, from an image to maps named by their strides.

Example: `Encoder("resnet18", pretrained=False)(torch.rand(1, 3, 64, 96))["encoder.32"]` has the shape (1, 512, 2, 3).
"""

import difflib
import logging
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from huggingface_hub import model_info, try_to_load_from_cache
from jaxtyping import Float
from timm.layers import Format
from timm.models import load_state_dict
from torch import Tensor, nn

from models.layers import Features, GroupNorm, group_norm, pad_to_multiple, stride_of

OWN_PREFIX = "encoder.backbone."  # of the encoder's tensors in the weights of a run


class Encoder(nn.Module):
    """A timm network without its classifier.

    name: a timm model, optionally with the tag of its weights ("resnet50.a1_in1k").
    pretrained: load timm's weights, from its cache or the network. Ignored where `weights` is given.
    weights: a .safetensors, .pth, .pt or .bin file with timm's (or torchvision's) tensors for this network.
    norm: what becomes of BatchNorm; networks without BatchNorm (ConvNeXt, Swin) are the same under all three.
        "frozen": it keeps the statistics of the loaded weights, scale and shift train. Batches here are small and hold
            one task each, so batch statistics would depend on the task. In an untrained network the statistics are
            0 and 1, so nothing is normalised: it trains, because timm starts each residual branch at zero, but slowly.
        "batch": the usual BatchNorm, for large mixed batches.
        "group": replaced by GroupNorm, which keeps scale and shift and needs no statistics: for training from scratch
            (ResNet-18, 250 steps on drawn shapes: loss 0.57, against 0.77 with "batch" and 0.79 with "frozen").
    size: (H, W) of the images, needed only by networks that are built for one size (Swin).
    strides: the strides to offer.

    Attribute `channels`: {"encoder.4": channels, ...}.
    ValueError: unknown name, a stride that the network lacks, weights that cannot be fetched, read or fitted.
    """

    def __init__(
        self,
        name: str = "resnet50",
        pretrained: bool = True,
        weights: str | Path | None = None,
        norm: Literal["frozen", "batch", "group"] = "frozen",
        size: tuple[int, int] | None = None,
        strides: tuple[int, ...] = (4, 8, 16, 32),
    ):
        super().__init__()
        self.norm = norm
        self.backbone = create_backbone(name, pretrained and weights is None, size)
        offered = self.backbone.feature_info.reduction()
        if missing := [stride for stride in strides if stride not in offered]:
            raise ValueError(
                f"encoder {name!r} has no features of stride {', '.join(map(str, missing))}: "
                f"it offers {', '.join(map(str, dict.fromkeys(offered)))}; choose another model.encoder.name"
            )
        if weights is not None:
            load_weights(self.backbone, name, Path(weights), statistics=norm != "group")
        if norm == "group":
            replace_batch_norm(self.backbone)

        # Where several maps have one stride, the last is the deepest.
        self.positions = {f"encoder.{s}": len(offered) - 1 - offered[::-1].index(s) for s in sorted(strides)}
        channels = self.backbone.feature_info.channels()
        self.channels = {feature: channels[position] for feature, position in self.positions.items()}
        self.channels_come_last = getattr(self.backbone, "output_fmt", None) == Format.NHWC
        for statistic in ("mean", "std"):
            values = torch.tensor(self.backbone.pretrained_cfg[statistic]).view(3, 1, 1)
            self.register_buffer(statistic, values, persistent=False)

    def train(self, mode: bool = True) -> "Encoder":
        super().train(mode)
        if self.norm == "frozen":
            for module in self.backbone.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(self, image: Float[Tensor, "B 3 H W"]) -> Features:
        """RGB in 0..1, any size; the features are not normalised and keep the dtype autocast gives them."""
        height, width = image.shape[-2:]
        # Padding the normalised image means padding with the mean colour. With whole cells at all strides, every
        # network agrees on the sizes of its maps, which those without padding of their own would round down.
        maps = self.backbone(pad_to_multiple((image - self.mean) / self.std, max(map(stride_of, self.channels))))
        if self.channels_come_last:
            maps = [features.permute(0, 3, 1, 2) for features in maps]
        return {
            name: maps[position][..., : -(-height // stride_of(name)), : -(-width // stride_of(name))]
            for name, position in self.positions.items()
        }


def create_backbone(name: str, pretrained: bool, size: tuple[int, int] | None) -> nn.Module:
    """The timm network that returns a list of feature maps, with a readable error for what the user can fix."""
    architecture = name.split(".")[0]
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models(), n=4)
        suggestion = f"did you mean {' or '.join(close)}?" if close else "see timm.list_models()"
        raise ValueError(f"unknown encoder {name!r}: {suggestion}")
    options: dict[str, Any] = {}
    configuration = timm.get_pretrained_cfg(name)
    if configuration is not None and configuration.fixed_input_size:
        if size is None:
            raise ValueError(f"encoder {name!r} is built for one image size: give its size = (H, W)")
        options["img_size"] = tuple(-(-side // 32) * 32 for side in size)
    # Without a connection the hub's client logs a dozen retries before the error below.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        if pretrained and configuration is not None and configuration.hf_hub_id:
            knock_at_hub(configuration.hf_hub_id)
        return timm.create_model(name, pretrained=pretrained, features_only=True, **options)
    except Exception as error:
        if not pretrained:
            raise
        # Hub, HTTP and cache each raise classes of their own; all mean that there are no weights.
        raise ValueError(
            f"the pretrained weights of encoder {name!r} could not be fetched ({type(error).__name__}): "
            "train without them (model.encoder.pretrained=false) or name a file (model.encoder.weights=FILE)"
        ) from error


def knock_at_hub(repository: str) -> None:
    """Raise at once what the hub's client would raise after a minute of retries when the server is out of reach.

    Weights in the client's cache need no connection.
    """
    files = ("model.safetensors", "pytorch_model.bin")
    if not any(isinstance(try_to_load_from_cache(repository, file), str) for file in files):
        model_info(repository, timeout=10)


def load_weights(backbone: nn.Module, name: str, path: Path, statistics: bool = True) -> None:
    """Fill the backbone from a weights file of the whole network, or of a run; its classifier and heads are left out.

    timm flattens some module names of a feature network ("stages.0" becomes "stages_0"), so tensors are matched by
    their names without dots. Without `statistics` the file need not have those of BatchNorm.
    """
    if not path.is_file():
        raise ValueError(f"model.encoder.weights: there is no file {path}")
    try:
        found = load_state_dict(str(path), weights_only=True)
    except Exception as error:
        # safetensors and torch have classes of their own for a broken file.
        raise ValueError(f"model.encoder.weights: cannot read {path} ({type(error).__name__}: {error})") from error
    found = {key.removeprefix(OWN_PREFIX).replace(".", "_"): tensor for key, tensor in found.items()}
    needless = ("num_batches_tracked",) if statistics else ("num_batches_tracked", "running_mean", "running_var")
    wanted = {key: tensor for key, tensor in backbone.state_dict().items() if not key.endswith(needless)}
    fitting = {}
    for key, tensor in wanted.items():
        candidate = found.get(key.replace(".", "_"))
        if isinstance(candidate, Tensor) and candidate.shape == tensor.shape:
            fitting[key] = candidate
    if missing := [key for key in wanted if key not in fitting]:
        raise ValueError(
            f"model.encoder.weights: {path} fits {len(fitting)} of {len(wanted)} tensors of encoder {name!r}; "
            f"the first that is missing or has another shape is {missing[0]!r}; is it the file of another network?"
        )
    backbone.load_state_dict(fitting, strict=False)


class GroupNormThen(GroupNorm):
    """GroupNorm in place of a BatchNorm, followed by the activation that timm builds into some of its BatchNorms."""

    def __init__(self, replaced: nn.BatchNorm2d):
        super().__init__(group_norm(replaced.num_features).num_groups, replaced.num_features, eps=replaced.eps)
        self.load_state_dict({"weight": replaced.weight.detach(), "bias": replaced.bias.detach()})
        self.following = nn.Sequential(
            *(getattr(replaced, part) for part in ("drop", "act") if hasattr(replaced, part))
        )

    def forward(self, features: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return self.following(super().forward(features))


def replace_batch_norm(module: nn.Module) -> None:
    """Put a GroupNorm with the same scale and shift in place of every BatchNorm below `module`."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, GroupNormThen(child))
        else:
            replace_batch_norm(child)
