"""LSeg: against transformers' DPT and OpenScene's way of showing it images."""

import argparse
from collections import Counter

import numpy as np
import pytest
from safetensors.numpy import save_file

from data.scene import View
from ggsd_jax.vision_language import clip, lseg

WIDTH, LAYERS, STAGES, DECODER, CHANNELS = 32, 4, (4, 8, 12, 16), 8, 16


def make_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Random tensors with the names and layouts of demo_e200.ckpt, and some that are not needed."""
    rng = np.random.default_rng(seed)
    tensors = {}

    def random(name, *shape, mean=0.0):
        tensors[f"net.{name}"] = rng.normal(mean, 0.2, shape).astype(np.float32)

    def layer(name, *shape, bias=None):
        random(f"{name}.weight", *shape)
        random(f"{name}.bias", shape[0] if bias is None else bias)

    def norm(name, width):
        random(f"{name}.weight", width, mean=1.0)
        random(f"{name}.bias", width)

    vit = "pretrained.model"
    random(f"{vit}.cls_token", 1, 1, WIDTH)
    random(f"{vit}.pos_embed", 1, 1 + 2 * 2, WIDTH)
    layer(f"{vit}.patch_embed.proj", WIDTH, 3, 16, 16)
    for i in range(LAYERS):
        norm(f"{vit}.blocks.{i}.norm1", WIDTH)
        norm(f"{vit}.blocks.{i}.norm2", WIDTH)
        layer(f"{vit}.blocks.{i}.attn.qkv", 3 * WIDTH, WIDTH)
        layer(f"{vit}.blocks.{i}.attn.proj", WIDTH, WIDTH)
        layer(f"{vit}.blocks.{i}.mlp.fc1", 2 * WIDTH, WIDTH)
        layer(f"{vit}.blocks.{i}.mlp.fc2", WIDTH, 2 * WIDTH)
    norm(f"{vit}.norm", WIDTH)
    for stage, width in enumerate(STAGES, start=1):
        name = f"pretrained.act_postprocess{stage}"
        layer(f"{name}.0.project.0", WIDTH, 2 * WIDTH)
        layer(f"{name}.3", width, WIDTH, 1, 1)
        kernel = {1: 4, 2: 2, 4: 3}.get(stage)
        if kernel:
            layer(f"{name}.4", width, width, kernel, kernel)
        random(f"scratch.layer{stage}_rn.weight", DECODER, width, 3, 3)
        layer(f"scratch.refinenet{stage}.out_conv", DECODER, DECODER, 1, 1)
        for unit in (f"scratch.refinenet{stage}.resConfUnit{i}" for i in (1, 2)):
            for i in (1, 2):
                random(f"{unit}.conv{i}.weight", DECODER, DECODER, 3, 3)
                norm(f"{unit}.bn{i}", DECODER)
                random(f"{unit}.bn{i}.running_mean", DECODER)
                tensors[f"net.{unit}.bn{i}.running_var"] = rng.uniform(0.5, 2, DECODER).astype(np.float32)
                tensors[f"net.{unit}.bn{i}.num_batches_tracked"] = np.array(7)
    layer("scratch.head1", CHANNELS, DECODER, 1, 1)
    random("clip_pretrained.text_projection", 24, CHANNELS)
    random("logit_scale")
    return tensors


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "lseg.safetensors"
    save_file(make_tensors(), path)
    return path


def features(teacher, image: np.ndarray) -> np.ndarray:
    size = image.shape[1::-1]
    views, features_of = teacher.look([View("view", np.eye(4), np.eye(3), size, image=image)])
    return features_of(next(views))


def random_image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def reference(torch, transformers):
    """transformers' DPT with the same weights; gives path_1 of a batch of images."""
    config = transformers.DPTConfig(
        hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=1, intermediate_size=2 * WIDTH, image_size=32,
        patch_size=16, is_hybrid=False, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=list(STAGES),
        reassemble_factors=[4, 2, 1, 0.5], fusion_hidden_size=DECODER, use_batch_norm_in_fusion_residual=True,
        readout_type="project", layer_norm_eps=1e-6, hidden_act="gelu", qkv_bias=True,
    )  # fmt: skip
    model = transformers.DPTForDepthEstimation(config).eval()
    ours = {name.removeprefix("net."): torch.tensor(value) for name, value in make_tensors().items()}
    state = {
        "dpt.embeddings.cls_token": ours["pretrained.model.cls_token"],
        "dpt.embeddings.position_embeddings": ours["pretrained.model.pos_embed"],
    }
    pairs = {"dpt.embeddings.patch_embeddings.projection": "pretrained.model.patch_embed.proj"}
    for i in range(LAYERS):
        theirs, block = f"dpt.encoder.layer.{i}", f"pretrained.model.blocks.{i}"
        pairs |= {
            f"{theirs}.layernorm_before": f"{block}.norm1",
            f"{theirs}.layernorm_after": f"{block}.norm2",
            f"{theirs}.attention.output.dense": f"{block}.attn.proj",
            f"{theirs}.intermediate.dense": f"{block}.mlp.fc1",
            f"{theirs}.output.dense": f"{block}.mlp.fc2",
        }
        for leaf in ("weight", "bias"):
            parts = ours[f"{block}.attn.qkv.{leaf}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                state[f"{theirs}.attention.attention.{name}.{leaf}"] = part
    for stage in (1, 2, 3, 4):
        name = f"pretrained.act_postprocess{stage}"
        pairs |= {
            f"neck.reassemble_stage.readout_projects.{stage - 1}.0": f"{name}.0.project.0",
            f"neck.reassemble_stage.layers.{stage - 1}.projection": f"{name}.3",
            f"neck.reassemble_stage.layers.{stage - 1}.resize": f"{name}.4",
            f"neck.convs.{stage - 1}": f"scratch.layer{stage}_rn",
            f"neck.fusion_stage.layers.{4 - stage}.projection": f"scratch.refinenet{stage}.out_conv",
        }
        for unit in (1, 2):
            for i in (1, 2):
                theirs = f"neck.fusion_stage.layers.{4 - stage}.residual_layer{unit}"
                mine = f"scratch.refinenet{stage}.resConfUnit{unit}"
                pairs[f"{theirs}.convolution{i}"] = f"{mine}.conv{i}"
                pairs[f"{theirs}.batch_norm{i}"] = f"{mine}.bn{i}"
    for theirs, mine in pairs.items():
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            if f"{mine}.{leaf}" in ours:
                state[f"{theirs}.{leaf}"] = ours[f"{mine}.{leaf}"]
    problems = model.load_state_dict(state, strict=False)
    used = ("dpt.encoder", "dpt.embeddings", "neck")
    missing = [name for name in problems.missing_keys if name.startswith(used) and "num_batches" not in name]
    assert not problems.unexpected_keys and not missing

    def path_1(images):
        states = model.dpt(images, output_hidden_states=True).hidden_states[1:]
        return model.neck(list(states), images.shape[2] // 16, images.shape[3] // 16)[-1]

    return path_1, ours


@pytest.mark.parametrize("height, width", [(24, 32), (40, 24)])
def test_features_are_those_of_the_reference_shown_as_openscene_does(tmp_path, height, width):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    path_1, tensors = reference(torch, transformers)
    path = tmp_path / "demo.ckpt"
    state = {name: torch.tensor(value) for name, value in make_tensors().items()}
    torch.save({"state_dict": state, "hyper_parameters": argparse.Namespace(x=1), "epoch": 3}, path)
    image = random_image(height, width)
    ours = features(lseg.load(path), image)

    functional = torch.nn.functional
    side = {(24, 32): 64, (40, 24): 96}[height, width]  # twice the long side, in multiples of 32
    x = (torch.tensor(image).float() / 255 - 0.5) / 0.5
    x = functional.interpolate(x.permute(2, 0, 1)[None], (2 * height, 2 * width), mode="bilinear", align_corners=True)
    x = functional.pad(x, (0, side - 2 * width, 0, side - 2 * height), value=-1)
    with torch.no_grad():
        both = []
        for shown in (x, x.flip(3)):
            head = functional.conv2d(path_1(shown), tensors["scratch.head1.weight"], tensors["scratch.head1.bias"])
            both.append(head / head.norm(dim=1, keepdim=True))
        theirs = (both[0] + both[1].flip(3))[0, :, :height, :width].permute(1, 2, 0).numpy()
    assert ours.shape == (height, width, CHANNELS) and ours.dtype == np.float32
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_on_an_accelerator_it_computes_in_bfloat16_and_stays_near(checkpoint, on_an_accelerator):
    image = random_image(24, 32)
    full, half, products = on_an_accelerator(
        lambda: lseg.load(checkpoint), lambda teacher: features(teacher, image), image[None]
    )
    assert half.dtype == np.float32 and 1e-4 < np.abs(half - full).max()
    lengths = np.linalg.norm(half, axis=-1) * np.linalg.norm(full, axis=-1)
    assert ((half * full).sum(axis=-1) / lengths).min() > 0.99
    assert Counter(products) == {"bf16": 75, "f32": 4}  # which resize the image and the position embeddings


def test_a_mirrored_image_has_mirrored_features(checkpoint):
    teacher, image = lseg.load(checkpoint), random_image(24, 32)
    one, other = features(teacher, image), features(teacher, image[:, ::-1])
    np.testing.assert_allclose(other, one[:, ::-1], atol=1e-4)
    assert np.abs(one - one[:, ::-1]).max() > 0.1
    assert np.linalg.norm(one, axis=-1).max() <= 2 + 1e-5


def test_the_space_is_that_of_the_text_tower_inside(checkpoint):
    teacher = lseg.load(checkpoint)
    projection = make_tensors()["net.clip_pretrained.text_projection"]
    assert teacher.space == clip.space("ViT-B/32", projection.T) and teacher.width == CHANNELS
    save_file({k: v for k, v in make_tensors().items() if "clip" not in k}, checkpoint)
    assert lseg.load(checkpoint).space == "ViT-B/32"


def test_bad_checkpoints_are_named(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.ckpt: no such file; LSeg's public checkpoint is demo_e200"):
        lseg.load(tmp_path / "gone.ckpt")
    tensors = make_tensors()
    wrong = {
        "scratch.refinenet2.resConfUnit1.bn2.running_var is missing": {
            k: v for k, v in tensors.items() if k != "net.scratch.refinenet2.resConfUnit1.bn2.running_var"
        },
        r"scratch\.layer3_rn\.weight has shape \[8, 3, 3, 3\]": tensors
        | {"net.scratch.layer3_rn.weight": np.zeros((8, 3, 3, 3), np.float32)},
        "not an LSeg checkpoint.*pretrained.model.patch_embed.proj.weight": {"a": np.zeros(3)},
        "its ViT has 3 blocks": {k: v for k, v in tensors.items() if ".blocks.3." not in k},
    }
    for message, content in wrong.items():
        save_file(content, checkpoint)
        with pytest.raises(ValueError, match=rf"lseg\.safetensors.*{message}"):
            lseg.load(checkpoint)
