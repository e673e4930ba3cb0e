"""Shape checking for every test, four CPU devices, the folder of reference data, and tiny CLIP snapshots."""

import dataclasses
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"

import numpy as np
import pytest
from jaxtyping import install_import_hook

install_import_hook(["kernels", "data", "ggsd_jax"], "beartype.beartype")

SHARED = Path(os.environ.get("GGSD_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of golden numbers and real samples; tests that need it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"reference data not found at {SHARED}; set GGSD_SHARED to the folder that holds it")
    return SHARED


@pytest.fixture
def on_an_accelerator(monkeypatch) -> Callable[..., tuple]:
    """Features of a 2D network as on a CPU and as on a GPU, and the type of each matrix product of a GPU's program."""
    import jax

    def compare(load: Callable, features: Callable, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[str]]:
        with jax.default_device(jax.devices("cpu")[0]):
            monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
            full = features(load())
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        teacher = load()
        half = features(teacher)
        compute = teacher.network
        program = compute.func.trace(*compute.args, images).lower(lowering_platforms=("cuda",)).as_text()
        products = re.findall(r"stablehlo\.(?:dot_general|convolution)\b.*: \(tensor<[0-9x]*x(\w+)>", program)
        return full, half, products

    return compare


@pytest.fixture
def clip_snapshot(tmp_path) -> Callable[..., Path]:
    """Writes a Hugging Face snapshot of a CLIP with random weights; its vocabulary is single letters."""
    from safetensors.numpy import save_file

    def write(name: str = "clip", *, seed: int = 0, width: int = 32, heads: int = 2, patch: int = 8) -> Path:
        rng = np.random.default_rng(seed)
        tensors = {"logit_scale": np.array(4.6, np.float32)}

        def random(name: str, *shape: int, mean: float = 0.0) -> None:
            tensors[name] = rng.normal(mean, 0.2, shape).astype(np.float32)

        def norm(name: str) -> None:
            random(f"{name}.weight", width, mean=1.0)
            random(f"{name}.bias", width)

        def dense(name: str, rows: int, columns: int) -> None:
            random(f"{name}.weight", rows, columns)
            random(f"{name}.bias", rows)

        for tower in ("text_model", "vision_model"):
            for layer in range(2):
                block = f"{tower}.encoder.layers.{layer}"
                norm(f"{block}.layer_norm1")
                norm(f"{block}.layer_norm2")
                for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                    dense(f"{block}.self_attn.{part}", width, width)
                dense(f"{block}.mlp.fc1", 4 * width, width)
                dense(f"{block}.mlp.fc2", width, 4 * width)
        random("text_model.embeddings.token_embedding.weight", 514, width)
        random("text_model.embeddings.position_embedding.weight", 32, width)
        norm("text_model.final_layer_norm")
        random("text_projection.weight", 16, width)
        random("vision_model.embeddings.class_embedding", width)
        random("vision_model.embeddings.patch_embedding.weight", width, 3, patch, patch)
        random("vision_model.embeddings.position_embedding.weight", 1 + (32 // patch) ** 2, width)
        norm("vision_model.pre_layrnorm")
        norm("vision_model.post_layernorm")
        random("visual_projection.weight", 16, width)

        sizes = dict(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2, num_attention_heads=heads)
        text = dict(vocab_size=514, max_position_embeddings=32, bos_token_id=512, eos_token_id=513)
        config = dict(
            model_type="clip",
            projection_dim=16,
            text_config=sizes | text,
            vision_config=sizes | dict(image_size=32, patch_size=patch),
        )
        letters = [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 256 + 68)]
        symbols = [chr(i) for i in letters]
        tokens = [*symbols, *(s + "</w>" for s in symbols), "<|startoftext|>", "<|endoftext|>"]
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        return folder

    return write


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    """An untrained MinkUNet14A of one-sixteenth of the width, as a folder that `inference.load` takes."""
    from flax.traverse_util import unflatten_dict

    from data.synthetic import SYNTHETIC
    from ggsd_jax import checkpoint
    from ggsd_jax.minkunet import MinkUNet, _variable_shapes, architecture

    arch = architecture("MinkUNet14A")
    shapes = _variable_shapes(MinkUNet(arch.layers, tuple(p // 16 for p in arch.planes), 32, 2), 3)
    rng = np.random.default_rng(0)
    initial = {
        "kernel": lambda shape: rng.normal(0, np.sqrt(2 / np.prod(shape[:-1])), shape),
        "bias": np.zeros,
        "scale": np.ones,
        "mean": np.zeros,
        "var": np.ones,
    }
    variables = unflatten_dict({path: initial[path[-1]](shape).astype(np.float32) for path, shape in shapes.items()})
    info = {
        "arch": "MinkUNet14A",
        "voxel_size": 0.1,
        "input_color": False,
        "text_encoder": "stand-in:32",
        "prompt": "a {} in a scene",
        "label_set": "synthetic",
        "classes": list(SYNTHETIC.classes),
        "trained_on": {"dataset": "synthetic", "teacher": "simulated", "scenes": 0},
    }
    folder = tmp_path_factory.mktemp("untrained") / "model"
    checkpoint.save_model(folder, variables, info)
    return folder


@pytest.fixture
def tiny_rooms(monkeypatch) -> None:
    """Makes every synthetic room the same glimpse of one, so that preparing takes no time."""
    from data.synthetic import generate_room
    from ggsd_jax import datasets

    glimpse = generate_room(0, scan_views=2, views=1, size=(40, 30))

    def room(seed: int):
        return glimpse._replace(scene=dataclasses.replace(glimpse.scene, name=f"room{seed}"))

    monkeypatch.setattr(datasets, "generate_room", room)
