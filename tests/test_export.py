import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import export as jax_export

from ggsd_jax import export, inference, portable
from kernels.voxel_grid import voxelize


@pytest.fixture(scope="module")
def points():
    rng = np.random.default_rng(0)
    return (rng.uniform(0, 1, (1500, 3)) * [3, 2, 0.3] - [1, 1, 0]).astype(np.float32)


@pytest.fixture(scope="module")
def shipped(model_dir, tmp_path_factory):
    """An export of the untrained model, with one program."""
    out = tmp_path_factory.mktemp("shipped") / "it"
    export.main([f"--model={model_dir}", str(out), "--buckets", "2048"])
    return out


def test_a_shipped_model_gives_the_same_numbers(model_dir, shipped, points):
    np.testing.assert_array_equal(inference.load(shipped).encode(points), inference.load(model_dir).encode(points))


@pytest.mark.parametrize("coloured", [False, True])
def test_a_program_gives_the_same_numbers_without_this_code(model_dir, points, tmp_path, coloured):
    """As MODEL_CARD.md says."""
    model = inference.load(model_dir)
    model = inference.Model(model.variables, model.info | {"input_color": coloured})
    colors = np.random.default_rng(0).integers(0, 256, points.shape).astype(np.uint8)
    export.write(tmp_path / "it", model, (2048,))
    card = (tmp_path / "it" / "MODEL_CARD.md").read_text()
    code = card.split("```python\n")[1].split("```")[0].replace("functions/", f"{tmp_path}/it/functions/")
    names = {"points": points} | ({"colors": colors} if coloured else {})
    exec(code, names)
    expected = model.encode(points, colors)
    np.testing.assert_allclose(names["features"], expected, atol=1e-5 * np.abs(expected).max())
    assert ("colors=colors" in card) == coloured


def test_rows_in_any_order_with_any_padding_give_the_same_features(model_dir, shipped):
    model, rng = inference.load(model_dir), np.random.default_rng(1)
    program = jax_export.deserialize((shipped / "functions" / "voxels_2048.jax").read_bytes())
    coords = rng.integers(-30, 90, (2048, 3)).astype(np.int32)
    count = 1300
    coords[:count] = rng.permutation(np.unique(rng.integers(-9, 9, (4000, 3)), axis=0))[:count]
    out = program.call(portable.flat(model.variables), coords, np.int32(count), np.ones((2048, 3), np.float32))
    rows = np.pad(coords[:count], ((0, 0), (1, 0)))
    expected = inference.encode_voxels(model.variables, rows, np.ones((count, 3)), arch="MinkUNet14A")
    np.testing.assert_allclose(out[:count], expected, atol=1e-5 * np.abs(expected).max())
    assert not np.asarray(out[count:]).any()


def test_a_cloud_with_too_many_coarse_voxels_is_nan(model_dir, shipped):
    program = jax_export.deserialize((shipped / "functions" / "voxels_2048.jax").read_bytes())
    scattered = (np.stack(np.unravel_index(np.arange(2048), (16, 16, 8)), 1) * 40).astype(np.int32)
    weights = portable.flat(inference.load(model_dir).variables)
    assert np.isnan(program.call(weights, scattered, np.int32(2048), np.ones((2048, 3), np.float32))).all()


@pytest.mark.parametrize("away", [(0, 0, 0), (2**30, -(2**31) + 64, 48)])
def test_a_program_gives_the_same_features_however_far_the_cloud_lies(shipped, model_dir, points, away):
    program = jax_export.deserialize((shipped / "functions" / "voxels_2048.jax").read_bytes())
    weights, voxels = portable.flat(inference.load(model_dir).variables), voxelize(points, 0.1)
    count = len(voxels.coords)
    here, there = (np.zeros((2048, 3), np.int32) for _ in range(2))
    here[:count], there[:count] = voxels.coords, voxels.coords + np.array(away, np.int64)
    expected, found = (program.call(weights, c, np.int32(count), np.ones((2048, 3), np.float32)) for c in (here, there))
    np.testing.assert_array_equal(found, expected)
    for far in (there[0, 2] // 16 * 16 + portable.EXTENT_LIMIT, np.iinfo(np.int32).max):
        there[0] = there[1:count].min(axis=0)
        there[0, 2] = far
        assert np.isnan(program.call(weights, there, np.int32(count), np.ones((2048, 3), np.float32))).all()


def test_a_program_runs_on_every_platform(shipped):
    program = jax_export.deserialize((shipped / "functions" / "voxels_2048.jax").read_bytes())
    assert program.platforms == portable.PLATFORMS and not jax.config.jax_enable_x64


def test_the_card_tells_data_licence_protocol_and_numbers(model_dir, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "model").symlink_to(model_dir)
    row = {"miou": 0.512, "macc": 0.634}
    results = {"dataset": "synthetic", "split": "val", "protocol": {"scenes": 3, "repeats": 5}, "rows": {"stage2": row}}
    (run / "results.json").write_text(json.dumps(results))
    (run / "config.json").write_text("{}")
    (tmp_path / "results.json").write_text("{}")  # of something else
    sources = {"first": run, "second": tmp_path / "first", "third": run / "model"}
    for name, source in sources.items():
        export.main([f"--model={source}", str(tmp_path / name), "--buckets", "2048"])
        card = (tmp_path / name / "MODEL_CARD.md").read_text()
        for part in (
            "| stage2 | 51.2 | 63.4 |",
            "repeats: 5",
            "Generated by this project",
            "stand-in:32",
            "0.1 m",
            "bathtub",
        ):
            assert part in card
        assert (tmp_path / name / "results.json").is_file()
    (tmp_path / "model").symlink_to(model_dir)
    export.main([f"--model={tmp_path / 'model'}", str(tmp_path / "fourth"), "--buckets", "2048"])
    assert "None were measured" in (tmp_path / "fourth" / "MODEL_CARD.md").read_text()


def test_the_licence_of_openscenes_downloads_is_that_of_their_data(model_dir):
    model = inference.load(model_dir)
    info = model.info | {"label_set": "scannet20", "trained_on": model.info["trained_on"] | {"dataset": "openscene"}}
    assert "ScanNet Terms of Use" in export.model_card("x", inference.Model(model.variables, info), None, ())


def test_a_file_of_embeddings_goes_along(model_dir, points, tmp_path):
    model = inference.load(model_dir)
    np.savez(tmp_path / "words.npz", embedding=model.embed(["wall", "lamp"]), names=np.array(["wall", "lamp"]))
    info = model.info | {"text_encoder": str(tmp_path / "words.npz"), "classes": ["wall", "lamp"]}
    export.write(tmp_path / "out", inference.Model(model.variables, info), ())
    assert str(tmp_path) not in (tmp_path / "out" / "MODEL_CARD.md").read_text()
    (tmp_path / "words.npz").unlink()
    moved = (tmp_path / "out").rename(tmp_path / "moved")
    np.testing.assert_array_equal(inference.load(moved).segment(points)[0], model.segment(points, ["wall", "lamp"])[0])


def test_an_export_replaces_an_export_and_nothing_else(model_dir, tmp_path):
    for _ in range(2):
        export.write(tmp_path / "out", inference.load(model_dir), ())
    (tmp_path / "link").symlink_to(tmp_path / "out")
    export.write(tmp_path / "link", inference.load(model_dir), ())
    assert (tmp_path / "link").is_symlink() and inference.load(tmp_path / "out")
    (tmp_path / "link").unlink()
    (tmp_path / "precious").mkdir()
    (tmp_path / "out.part").mkdir()
    with pytest.raises(FileExistsError, match="no export wrote it"):
        export.write(tmp_path / "precious", inference.load(model_dir), ())
    shutil.copytree(model_dir, tmp_path / "trained")
    with pytest.raises(FileExistsError, match="no export wrote it"):
        export.write(tmp_path / "trained", inference.load(model_dir), ())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.part", "precious", "trained"]
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "precious").stat().st_mode


def test_a_folder_to_write_need_not_be_named(model_dir, tmp_path, monkeypatch, capsys):
    (tmp_path / "rooms").mkdir()
    (tmp_path / "rooms" / "model").symlink_to(model_dir)
    monkeypatch.chdir(tmp_path)
    for model in ("rooms", "rooms/model"):
        export.main([f"--model={model}", "--buckets", "128"])
        assert "written: out/export/rooms/" in capsys.readouterr().out
    assert inference.load(tmp_path / "out/export/rooms").info["voxel_size"] == 0.1
    assert export._default_out(Path("x/scannet_lseg.pth.tar")) == Path("out/export/scannet_lseg")


def test_an_openscene_checkpoint_converts_in_one_command(shared, tmp_path):
    checkpoint, golden = shared / "golden/narrow_ckpt.pth.tar", np.load(shared / "golden/narrow_ckpt_golden.npz")
    named = tmp_path / "scannet_openseg.pth.tar"
    named.symlink_to(checkpoint.resolve())
    export.main([f"--openscene={named}", "--text_encoder=stand-in:96", str(tmp_path / "out"), "--buckets", "2048"])
    model = inference.load(tmp_path / "out")
    assert (model.info["voxel_size"], model.info["label_set"]) == (0.02, "scannet20")
    assert "non-commercial" in (tmp_path / "out" / "MODEL_CARD.md").read_text()
    voxels = golden["coords"][golden["coords"][:, 0] == 0][:, 1:]
    features = model.encode(((voxels + 0.5) * 0.02).astype(np.float32))
    expected = inference.encode_voxels(
        model.variables, golden["coords"], np.ones((len(golden["coords"]), 3)), arch="MinkUNet18A"
    )[golden["coords"][:, 0] == 0]
    np.testing.assert_allclose(features, expected, atol=1e-5 * np.abs(expected).max())
    assert voxelize(((voxels + 0.5) * 0.02).astype(np.float32), 0.02).coords.shape == voxels.shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=nowhere", "out"], "nowhere holds no model"),
        (["--openscene=nowhere.pth.tar", "out", "--text_encoder=stand-in"], "nowhere.pth.tar"),
        (["--openscene=nowhere.pth.tar", "out"], "needs --text_encoder"),
        (["--model={model}", "out", "--voxel_size=0.02"], "a trained model knows its own"),
        (["--model={model}", "{tmp}/out", "--buckets", "1000"], "a positive multiple of 128"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(model_dir, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        export.main([a.format(model=model_dir, tmp=tmp_path) for a in arguments])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_encoder": "stand-in:32"}, "96 channels, --text_encoder=stand-in:32 32"),
        ({"voxel_size": None}, "state --voxel_size"),
        ({"voxel_size": -1.0}, "expected metres"),
        ({"label_set": "nyu4"}, "did you mean 'nyu40'"),
    ],
)
def test_what_an_openscene_checkpoint_lacks_must_be_stated(shared, change, message):
    stated = {"text_encoder": "stand-in:96", "voxel_size": 0.02, "label_set": "scannet20"} | change
    with pytest.raises(ValueError, match=message):
        export.from_openscene(shared / "golden/narrow_ckpt.pth.tar", **stated)
