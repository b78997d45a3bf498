"""The shared network: sizes at odd images, which heads run on which rows, precision, and errors a user can act on."""

import math

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from models.bifpn import BiFPN
from models.encoders import Encoder
from models.heads import DenseDetectionHead, DepthHead, GridHead, MapHead, count_cells, locate_cells
from models.layers import enlarge, stride_of
from models.multitask import MultitaskNet

SIZES = [(64, 96), (75, 131), (33, 257)]


def build_net(**encoder_options):
    torch.manual_seed(0)
    encoder = Encoder("resnet18", **{"pretrained": False, "norm": "group"} | encoder_options)
    neck = BiFPN(encoder.channels, width=32, repeats=1)
    channels = encoder.channels | neck.channels
    heads = {
        "map": MapHead(channels, outputs=5, width=32),
        "depth": DepthHead(channels, width=32, layers=1),
        "boxes": DenseDetectionHead(channels, classes=3, width=64, layers=1),
        "number": GridHead(channels, width=16, hidden=16, outputs=2),
    }
    return MultitaskNet(encoder, neck, heads)


@pytest.fixture(scope="module")
def net():
    return build_net().eval()


def flatten(output):
    """The tensors of an output, for comparing outputs of any head."""
    return [output] if isinstance(output, torch.Tensor) else [part for part in output if isinstance(part, torch.Tensor)]


def count_calls(module):
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


# Encoder


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenetv4_conv_small", "convnext_atto", "swin_tiny_patch4_window7_224"]
)
def test_encoder_offers_its_channels_at_every_size(name, size):
    encoder = Encoder(name, pretrained=False, size=size)
    with torch.no_grad():
        features = encoder(torch.rand(1, 3, *size))
    assert list(features) == list(encoder.channels) == ["encoder.4", "encoder.8", "encoder.16", "encoder.32"]
    for feature, channels in encoder.channels.items():
        cells = [math.ceil(side / stride_of(feature)) for side in size]
        assert features[feature].shape == (1, channels, *cells)


def test_encoder_normalises_its_input():
    encoder = Encoder("tf_efficientnetv2_b0", pretrained=False)
    seen = []
    encoder.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image = torch.rand(1, 3, 64, 96)
    encoder(image)
    configuration = timm.get_pretrained_cfg("tf_efficientnetv2_b0")
    for channel in range(3):
        expected = (image[0, channel] - configuration.mean[channel]) / configuration.std[channel]
        torch.testing.assert_close(seen[0][0, channel], expected)


def test_a_feature_does_not_move_with_the_size_of_the_image():
    """Cells far from the cut are over the same pixels, however much of the image is left."""
    encoder = Encoder("resnet18", pretrained=False).eval()
    image = torch.rand(1, 3, 256, 256)
    with torch.no_grad():
        whole, cut = encoder(image)["encoder.8"], encoder(image[..., :201, :203])["encoder.8"]
    torch.testing.assert_close(cut[..., :6, :6], whole[..., :6, :6])


def test_frozen_batch_norm_keeps_its_statistics_and_trains_its_scale():
    for norm, moves in [("frozen", False), ("batch", True)]:
        encoder = Encoder("resnet18", pretrained=False, norm=norm).train()
        sum(features.sum() for features in encoder(torch.rand(2, 3, 64, 64)).values()).backward()
        assert (encoder.backbone.bn1.running_mean.abs().sum() > 0) == moves
        assert encoder.backbone.bn1.weight.grad is not None


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv4_conv_small"])
def test_group_norm_leaves_no_batch_norm_and_no_dependence_on_the_batch(name):
    encoder = Encoder(name, pretrained=False, norm="group").train()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in encoder.modules())
    images = torch.rand(2, 3, 64, 64)
    together, alone = encoder(images), encoder(images[:1])
    for feature in together:
        torch.testing.assert_close(together[feature][:1], alone[feature], rtol=1e-3, atol=1e-4)


def test_group_norm_keeps_the_activation_inside_timm_batch_norm():
    plain = Encoder("mobilenetv4_conv_small", pretrained=False).backbone.blocks[0][0].bn1
    grouped = Encoder("mobilenetv4_conv_small", pretrained=False, norm="group").backbone.blocks[0][0].bn1
    assert isinstance(plain.act, nn.ReLU)
    assert grouped(torch.randn(1, plain.num_features, 4, 4)).min() == 0


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_weights_file_of_the_whole_network_fills_the_encoder(tmp_path, name, suffix):
    whole = timm.create_model(name, pretrained=False)
    path = tmp_path / f"weights{suffix}"
    save_file(whole.state_dict(), path) if suffix == ".safetensors" else torch.save(whole.state_dict(), path)
    encoder = Encoder(name, weights=path)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = whole.eval().forward_intermediates((image - encoder.mean) / encoder.std, intermediates_only=True)
        features = encoder.eval()(image)
    torch.testing.assert_close(features["encoder.32"], expected[-1])


def test_weights_of_another_network_are_refused(tmp_path):
    path = tmp_path / "weights.safetensors"
    save_file(timm.create_model("resnet26", pretrained=False).state_dict(), path)
    with pytest.raises(ValueError, match=r"weights\.safetensors fits \d+ of \d+ tensors of encoder 'resnet18'"):
        Encoder("resnet18", weights=path)


def test_missing_and_broken_weights_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file .*absent\.pth"):
        Encoder("resnet18", weights=tmp_path / "absent.pth")
    for name in ("broken.pth", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"<html>not found</html>")
        with pytest.raises(ValueError, match=rf"cannot read .*{name}"):
            Encoder("resnet18", weights=tmp_path / name)


class Bomb:
    def __reduce__(self):
        return print, ("executed",)


def test_weights_file_cannot_execute_code(tmp_path, capsys):
    torch.save({"conv1.weight": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(ValueError, match="cannot read"):
        Encoder("resnet18", weights=tmp_path / "bomb.pth")
    assert "executed" not in capsys.readouterr().out


def test_pretrained_weights_out_of_reach_name_the_two_ways_out(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"encoder\.pretrained=false.*encoder\.weights=FILE") as caught:
        Encoder("resnet18")
    assert "\n" not in str(caught.value)


def test_pretrained_weights_in_the_cache_need_no_connection(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--timm--resnet18.a1_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    whole = timm.create_model("resnet18", pretrained=False)
    save_file(whole.state_dict(), repository / "snapshots" / ("0" * 40) / "model.safetensors")
    assert torch.equal(Encoder("resnet18").backbone.layer4[1].conv2.weight, whole.layer4[1].conv2.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet51"}, "unknown encoder 'resnet51': did you mean .*resnet50"),
        ({"name": "vit_tiny_patch16_224", "size": (64, 64)}, "no features of stride 4, 8, 32: it offers 16"),
        ({"name": "swin_tiny_patch4_window7_224"}, "built for one image size"),
    ],
)
def test_encoder_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Encoder(pretrained=False, **options)


# Neck


@pytest.mark.parametrize("size", SIZES)
def test_neck_levels_cover_the_image(net, size):
    with torch.no_grad():
        features = net.shared_features(torch.rand(1, 3, *size))
    assert list(net.neck.channels) == [f"neck.{stride}" for stride in (4, 8, 16, 32, 64, 128)]
    for name, channels in net.neck.channels.items():
        assert features[name].shape == (1, channels, *(math.ceil(side / stride_of(name)) for side in size))


def test_every_level_of_the_neck_sees_every_level_of_the_encoder():
    neck = BiFPN({"encoder.4": 8, "encoder.8": 8, "encoder.16": 8, "encoder.32": 8}, width=16, repeats=1)
    for output in neck.channels:
        inputs = {name: torch.randn(1, 8, 256 // stride_of(name), 256 // stride_of(name)) for name in neck.reads}
        for features in inputs.values():
            features.requires_grad_()
        neck(inputs)[output].square().sum().backward()
        assert all(features.grad.abs().sum() > 0 for features in inputs.values()), output


def test_fusion_weights_start_equal_and_count_by_their_share():
    neck = BiFPN({"x.4": 8, "x.8": 8, "x.16": 8, "x.32": 8}, width=16, repeats=2).eval()
    fusions = [fusion for layer in neck.layers for fusion in layer.fusions]
    a, b = torch.randn(2, 1, 16, 8, 8)
    with torch.no_grad():
        for fusion, weights in zip(fusions, neck.normalise_weights(torch.float32), strict=True):
            assert weights.tolist() == pytest.approx([1 / len(weights)] * len(weights), rel=1e-3)
            if len(weights) == 2:
                torch.testing.assert_close(
                    fusion([a, b], weights), fusion.convolution((a + b) / 2), rtol=1e-3, atol=1e-3
                )
        # of each fusion its own weights alone matter
        for number, fusion in enumerate(fusions):
            fusion.weights.copy_(torch.tensor([3.0 + number, -1.0, 1.0][: len(fusion.weights)]))
        for number, weights in enumerate(neck.normalise_weights(torch.float32)):
            wanted = [1.0, 0.0] if len(weights) == 2 else [(3 + number) / (4 + number), 0.0, 1 / (4 + number)]
            assert weights.tolist() == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("factor", [2, 8, 128])
def test_enlarging_keeps_each_cell_over_its_own_pixels(factor):
    size = (75, 131)
    rows, columns = (math.ceil(side / factor) for side in size)
    cells = torch.arange(rows * columns).view(1, 1, rows, columns).float()
    pixels = enlarge(cells, factor, size, mode="nearest")[0, 0]
    y, x = torch.meshgrid(torch.arange(75), torch.arange(131), indexing="ij")
    assert torch.equal(pixels, cells[0, 0][y // factor, x // factor])


# Heads


@pytest.mark.parametrize("size", SIZES)
def test_shapes_of_the_outputs(net, size):
    with torch.no_grad():
        outputs = net(torch.rand(2, 3, *size))
    locations = sum(math.ceil(size[0] / s) * math.ceil(size[1] / s) for s in (8, 16, 32, 64, 128))
    assert outputs["map"].shape == (2, 5, *size)
    assert outputs["depth"].shape == (2, *size)
    assert outputs["number"].shape == (2, 2)
    boxes = outputs["boxes"]
    assert boxes.classes.shape == (2, locations, 3)
    assert boxes.boxes.shape == (2, locations, 4)
    assert boxes.centreness.shape == (2, locations)
    assert (boxes.strides, boxes.size) == ((8, 16, 32, 64, 128), size)
    assert (boxes.boxes > 0).all()


@pytest.mark.parametrize("size", SIZES)
def test_locations_are_the_centres_of_cells_that_tile_the_image(size):
    strides = (8, 32, 128)
    levels = locate_cells(size, strides).split([math.prod(count_cells(size, stride)) for stride in strides])
    for stride, of_level in zip(strides, levels, strict=True):
        corners = of_level - stride / 2
        assert torch.equal(corners, (corners / stride).round() * stride)
        assert len(corners.unique(dim=0)) == len(corners)
        assert corners.min() == 0
        last = corners.max(dim=0).values
        assert last[0] < size[1] <= last[0] + stride
        assert last[1] < size[0] <= last[1] + stride


def test_detector_lists_its_cells_in_the_order_of_the_locations():
    """A single bright cell of the features moves the boxes at its own location the most."""
    torch.manual_seed(0)
    head = DenseDetectionHead({"x.8": 32, "x.16": 32}, reads=("x.16", "x.8"), width=32, layers=0)
    size, strides = (75, 131), (8, 16)
    nn.init.normal_(head.regression.bbox_reg.weight)
    features = {"x.8": torch.zeros(1, 32, 10, 17), "x.16": torch.zeros(1, 32, 5, 9)}
    features["x.16"][0, :, 3, 7] = 1
    starts = torch.cat([torch.full((math.prod(count_cells(size, stride)), 1), 4.0 * stride) for stride in strides])
    changed = ~head(features, size).boxes[0].isclose(starts).all(dim=1)
    reached = locate_cells(size, strides)[changed]
    assert len(reached) == 9
    assert torch.equal(reached.mean(dim=0), torch.tensor([7.5 * 16, 3.5 * 16]))
    assert head.strides == strides


def test_untrained_predictions():
    channels = {"neck.4": 32}
    features, size = {"neck.4": torch.randn(1, 32, 16, 24)}, (64, 96)
    for bins in (0, 64):
        depth = DepthHead(channels, width=32, initial=10.0, bins=bins)(features, size).exp()
        assert 9 < depth.median() < 11
    number = GridHead(channels, reads=("neck.4",), width=16, hidden=16)(features, size)
    assert (number == 0).all()


def test_bins_keep_the_depth_between_their_ends():
    head = DepthHead({"neck.4": 32}, width=32, bins=16, nearest=2.0, initial=5.0, farthest=50.0)
    nn.init.normal_(head.last.weight, std=10)
    depth = head({"neck.4": torch.randn(1, 32, 16, 24)}, (64, 96)).exp()
    assert depth.min() >= 2 * (1 - 1e-5)
    assert depth.max() <= 50 * (1 + 1e-5)
    assert depth.max() > 2 * depth.min()


def test_adapter_starts_as_identity_and_stop_gradient_spares_the_features():
    channels = {"neck.4": 32}
    head = MapHead(channels, reads=("neck.4",), width=32)
    adapted = MapHead(channels, reads=("neck.4",), width=32, adapter=True, stop_gradient=True)
    adapted.load_state_dict(head.state_dict(), strict=False)
    features = {"neck.4": torch.randn(1, 32, 16, 24, requires_grad=True)}
    output = adapted(features, (64, 96))
    assert torch.equal(head(features, (64, 96)), output)
    output.sum().backward()
    assert features["neck.4"].grad is None
    assert adapted.adapters[0].change[-1].weight.grad.abs().sum() > 0


def test_a_head_names_the_features_there_are():
    with pytest.raises(ValueError, match=r"cannot read neck\.2: the network offers neck\.4, neck\.8"):
        MapHead({"neck.4": 32, "neck.8": 32}, reads=("neck.2", "neck.4"))
    with pytest.raises(ValueError, match=r"must read at least one of neck\.4"):
        MapHead({"neck.4": 32}, reads=())
    with pytest.raises(ValueError, match="must rise: nearest 20"):
        DepthHead({"neck.4": 32}, bins=16, nearest=20.0)


# The whole network


def test_only_the_parts_asked_for_run():
    net = build_net().eval()
    calls = {name: count_calls(head) for name, head in net.heads.items()}
    neck_calls = count_calls(net.neck)
    image = torch.rand(2, 3, 64, 96)
    assert list(net(image, {"number": None})) == ["number"]
    assert len(neck_calls) == 0
    assert list(net(image, {"depth": slice(0, 1), "map": None})) == ["depth", "map"]
    assert len(neck_calls) == 1
    assert {name: len(seen) for name, seen in calls.items()} == {"map": 1, "depth": 1, "boxes": 0, "number": 1}


@pytest.mark.parametrize("rows", [slice(1, 3), torch.tensor([2, 0])])
def test_rows_are_the_same_as_a_batch_of_those_images(net, rows):
    nn.init.normal_(net.heads["number"].last.weight)
    image = torch.rand(3, 3, 75, 131)
    with torch.no_grad():
        selected, alone = net(image, dict.fromkeys(net.heads, rows)), net(image[rows])
    for name in net.heads:
        for a, b in zip(flatten(selected[name]), flatten(alone[name]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_uint8_is_the_same_as_its_fractions(net):
    image = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(net(image)["map"], net(image.float() / 255)["map"])


def test_outputs_are_float32_under_autocast_and_float64_in_a_float64_net():
    net = build_net().eval()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            features = net.shared_features(torch.rand(1, 3, 64, 96))
            outputs = net(torch.rand(1, 3, 64, 96))
        assert features["encoder.32"].dtype == torch.bfloat16
        assert {part.dtype for output in outputs.values() for part in flatten(output)} == {torch.float32}
        outputs = net.double()(torch.rand(1, 3, 64, 96, dtype=torch.float64))
        assert {part.dtype for output in outputs.values() for part in flatten(output)} == {torch.float64}


def test_one_head_at_a_time_gives_the_gradients_of_all_at_once():
    """The order of work of the training step: each head backward on detached features, then encoder and neck once."""
    net = build_net().double().train()
    nn.init.normal_(net.heads["number"].last.weight)
    image = torch.rand(2, 3, 64, 96, dtype=torch.float64)

    def total(output):
        return sum(part.sin().sum() for part in flatten(output))

    sum(total(output) for output in net(image).values()).backward()
    expected = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}

    net.zero_grad()
    features = net.shared_features(image)
    detached = {name: feature.detach().requires_grad_() for name, feature in features.items()}
    for name in net.heads:
        total(net.run_head(name, detached, (64, 96))).backward()
    used = [name for name in features if detached[name].grad is not None]
    torch.autograd.backward([features[name] for name in used], [detached[name].grad for name in used])
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_every_parameter_belongs_to_one_part_and_gets_a_gradient():
    net = build_net().train()
    nn.init.normal_(net.heads["number"].last.weight)
    sum(part.sin().sum() for output in net(torch.rand(1, 3, 64, 96)).values() for part in flatten(output)).backward()
    parts = [net.shared_parameters(), *(net.head_parameters(name) for name in net.heads)]
    assert sorted(map(id, (p for part in parts for p in part))) == sorted(map(id, net.parameters()))
    assert [name for name, parameter in net.named_parameters() if parameter.grad is None] == []


def test_channels_last_changes_nothing(net):
    image = torch.rand(1, 3, 75, 131)
    with torch.no_grad():
        expected = net(image)["depth"]
        laid_out = build_net().eval().to(memory_format=torch.channels_last)
        torch.testing.assert_close(laid_out(image.contiguous(memory_format=torch.channels_last))["depth"], expected)
