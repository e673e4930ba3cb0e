"""CLIP's towers: against transformers, from every form the weights come in, and errors for damaged ones."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from ggsd_jax.vision_language import clip, tokenizer


def relative(a, b) -> float:
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max())


def pixels(*shape) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def test_both_towers_give_what_transformers_gives(clip_snapshot):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = clip_snapshot()
    theirs, ours = transformers.CLIPModel.from_pretrained(folder).eval(), clip.load(folder)
    ids, ends = tokenizer.load(folder).batch(["a chair in a scene", "x", "wall"], 32)
    images = pixels(2, 48, 64, 3)  # not the 32 x 32 of the config: positions are interpolated
    with torch.no_grad():
        text = theirs.text_projection(theirs.text_model(torch.tensor(ids).long()).pooler_output)
        tokens = theirs.vision_model(
            torch.tensor(np.asarray(images)).permute(0, 3, 1, 2), interpolate_pos_encoding=True
        )
        image = theirs.visual_projection(tokens.pooler_output)
    sentences = apply(clip.TextTower(ours.config), ours.text, ids, ends)
    assert relative(sentences, text) < 1e-5
    assert relative(apply(clip.ImageTower(ours.config), ours.vision, images), image) < 1e-5


def apply(tower, variables, *inputs, **options) -> np.ndarray:
    return np.asarray(jax.jit(functools.partial(tower.apply, **options))(variables, *inputs))


def openai_tensors(folder) -> dict[str, np.ndarray]:
    """The tensors of a snapshot as OpenAI names and lays them out."""
    theirs = load_file(folder / "model.safetensors")
    result = {
        "visual.class_embedding": theirs["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": theirs["vision_model.embeddings.position_embedding.weight"],
        "visual.conv1.weight": theirs["vision_model.embeddings.patch_embedding.weight"],
        "visual.proj": theirs["visual_projection.weight"].T,
        "token_embedding.weight": theirs["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": theirs["text_model.embeddings.position_embedding.weight"],
        "text_projection": theirs["text_projection.weight"].T,
        "input_resolution": np.array(32),
    }
    for leaf in ("weight", "bias"):
        result[f"visual.ln_pre.{leaf}"] = theirs[f"vision_model.pre_layrnorm.{leaf}"]
        result[f"visual.ln_post.{leaf}"] = theirs[f"vision_model.post_layernorm.{leaf}"]
        result[f"ln_final.{leaf}"] = theirs[f"text_model.final_layer_norm.{leaf}"]
        for tower, prefix in (("vision_model", "visual."), ("text_model", "")):
            for layer in range(2):
                old, new = f"{tower}.encoder.layers.{layer}", f"{prefix}transformer.resblocks.{layer}"
                result[f"{new}.ln_1.{leaf}"] = theirs[f"{old}.layer_norm1.{leaf}"]
                result[f"{new}.ln_2.{leaf}"] = theirs[f"{old}.layer_norm2.{leaf}"]
                result[f"{new}.mlp.c_fc.{leaf}"] = theirs[f"{old}.mlp.fc1.{leaf}"]
                result[f"{new}.mlp.c_proj.{leaf}"] = theirs[f"{old}.mlp.fc2.{leaf}"]
                result[f"{new}.attn.out_proj.{leaf}"] = theirs[f"{old}.self_attn.out_proj.{leaf}"]
                parts = [theirs[f"{old}.self_attn.{part}_proj.{leaf}"] for part in "qkv"]
                result[f"{new}.attn.in_proj_{leaf}"] = np.concatenate(parts)
    return {name: np.ascontiguousarray(value) for name, value in result.items()}


def assert_same_model(a: clip.Clip, b: clip.Clip):
    assert (a.config, a.space) == (b.config, b.space)
    jax.tree.map(np.testing.assert_array_equal, (a.text, a.vision), (b.text, b.vision))


@pytest.mark.parametrize("form", ["safetensors", "state dict", "TorchScript"])
def test_openais_weights_give_the_same_model(clip_snapshot, tmp_path, form):
    folder = clip_snapshot(width=64, heads=1)
    tensors = openai_tensors(folder)
    other = tmp_path / "openai"
    other.mkdir()
    if form == "safetensors":
        save_file(tensors, other / "model.safetensors")
    else:
        torch = pytest.importorskip("torch")
        state = {name: torch.tensor(value) for name, value in tensors.items()}
        if form == "state dict":
            torch.save(state, other / "ViT-B-32.pt")
        else:
            torch.jit.save(torch.jit.script(nested(torch, state)), str(other / "ViT-B-32.pt"))
    assert_same_model(clip.load(other), clip.load(folder))


def nested(torch, state):
    """A module whose parameters have these dotted names."""
    root = torch.nn.Module()
    for name, value in state.items():
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            if parent not in dict(module.named_children()):
                module.add_module(parent, torch.nn.Module())
            module = dict(module.named_children())[parent]
        module.register_buffer(leaf, value)
    return root


def test_a_sentence_has_one_embedding_whatever_else_is_asked(clip_snapshot):
    encode = clip.TextEncoder(clip_snapshot())
    rows = encode([f"thing {i}" for i in range(70)])  # more than one batch
    np.testing.assert_allclose(encode(["thing 68"])[0], rows[68], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert rows.shape == (70, 16) and len(np.unique(rows.round(4), axis=0)) == 70


def test_dense_features_ignore_the_queries_and_keys_of_the_last_block(clip_snapshot):
    model = clip.load(clip_snapshot())
    tower, images = clip.ImageTower(model.config), pixels(1, 32, 48, 3)
    before = apply(tower, model.vision, images, dense=True)
    params = dict(model.vision["params"])
    last = params["vision_model.encoder.layers.1"]
    halved = {part: jax.tree.map(lambda x: x / 2, last["self_attn"][part]) for part in ("q_proj", "k_proj")}
    params["vision_model.encoder.layers.1"] = last | {"self_attn": last["self_attn"] | halved}
    np.testing.assert_array_equal(apply(tower, {"params": params}, images, dense=True), before)
    assert before.shape == (1, 4, 6, 16)
    assert relative(apply(tower, {"params": params}, images), apply(tower, model.vision, images)) > 1e-3


def test_bfloat16_stays_near_float32(clip_snapshot):
    model = clip.load(clip_snapshot())
    images = pixels(1, 32, 32, 3)
    full = apply(clip.ImageTower(model.config), model.vision, images, dense=True)
    half = apply(clip.ImageTower(model.config, jnp.bfloat16), model.vision, images, dense=True)
    assert half.dtype == np.float32 and relative(half, full) < 0.05


def test_models_are_known_by_the_names_openai_gave_them_and_by_their_weights(clip_snapshot):
    tower = clip.Tower(1024, 24, 16, 4096, "quick_gelu")
    assert clip.Config(768, tower, tower, 49408, 77, image_size=336, patch=14).name == "ViT-L/14@336px"
    one, other = clip.load(clip_snapshot("one")), clip.load(clip_snapshot("other", seed=1))
    assert one.config == other.config and one.space != other.space
    projection = load_file(one.folder / "model.safetensors")["text_projection.weight"]
    assert clip.space("x", projection.astype(np.float16)) == clip.space("x", projection)


@pytest.mark.parametrize(
    "patch, image_size, width, parameters",
    [
        (32, 224, 768, 151_277_313),
        (16, 224, 768, 149_620_737),
        (14, 224, 1024, 427_616_513),
        (14, 336, 1024, 427_944_193),
    ],
)
def test_the_published_models_have_as_many_parameters_as_openais(tmp_path, patch, image_size, width, parameters):
    """With all that a config.json may leave out left out; 1 parameter is the logit scale, which is not read."""
    large = width == 1024
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
    content = {
        "projection_dim": 768 if large else 512,
        "text_config": text if large else {},
        "vision_config": (sizes if large else {}) | {"patch_size": patch, "image_size": image_size},
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = clip._read_config(tmp_path / "config.json")
    leaves = jax.tree.leaves(clip.shapes(config))
    assert sum(leaf.size for leaf in leaves) + 1 == parameters
    assert config.name in ("ViT-B/32", "ViT-B/16", "ViT-L/14", "ViT-L/14@336px")


# ------------------------------------------------------------------------------------------------- what goes wrong


def change(folder, **tensors) -> None:
    """Replaces tensors of a snapshot; None drops one."""
    there = load_file(folder / "model.safetensors") | {k.replace("__", "."): v for k, v in tensors.items()}
    save_file({name: value for name, value in there.items() if value is not None}, folder / "model.safetensors")


def test_truncated_weights_are_named(clip_snapshot):
    path = clip_snapshot() / "model.safetensors"
    whole = path.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 20, 0):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"model\.safetensors: truncated or not a safetensors file"):
            clip.load(path.parent)


def test_missing_tensors_are_named(clip_snapshot):
    folder = clip_snapshot()
    change(folder, vision_model__post_layernorm__bias=None)
    with pytest.raises(ValueError, match=r"model\.safetensors.*vision_model\.post_layernorm\.bias is missing"):
        clip.load(folder)


def test_widths_other_than_the_configs_are_named(clip_snapshot):
    folder = clip_snapshot()
    config = json.loads((folder / "config.json").read_text())
    config["projection_dim"] = 12
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"text_projection.weight has shape \[16, 32\].*where \[32, 12\] is expected"):
        clip.load(folder)


def test_weights_that_are_not_finite_are_named(clip_snapshot):
    folder = clip_snapshot()
    change(folder, visual_projection__weight=np.full((16, 32), np.nan, np.float32))
    with pytest.raises(ValueError, match="visual_projection.weight has values that are not finite"):
        clip.load(folder)


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not the config of a CLIP model"),
        ('{"text_config": {"hidden_act": "relu"}}', "hidden_act is 'relu'"),
        ('{"text_config": {"num_attention_heads": 7}}', "expected heads to divide the width"),
        ("[]", "not the config of a CLIP model"),
        ('{"vision_config": {"patch_size": 0}}', "patch is 0, expected a positive"),
        ('{"vision_config": {"image_size": "224"}}', "image_size is '224', expected a positive"),
    ],
)
def test_a_bad_config_is_named(clip_snapshot, text, message):
    folder = clip_snapshot()
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=rf"config\.json.*{message}"):
        clip.load(folder)


def test_folders_without_one_clip_are_refused(clip_snapshot, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        clip.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty: expected model.safetensors"):
        clip.load(tmp_path / "empty")
    folder = clip_snapshot()
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match="not CLIP: it has no tensor visual.proj. Weights with Hugging Face's names"):
        clip.load(folder)
    save_file({"visual.attnpool.c_proj.weight": np.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="a CLIP with a ResNet, only the ViT models are read"):
        clip.load(folder)
