"""From raw data to a prepared dataset and back."""

import dataclasses
import functools
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import ml_collections
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data.feature_codes import STEP, dequantize, quantize
from data.scene import Scene
from data.synthetic import generate_room
from ggsd_jax import datasets, prepare
from ggsd_jax.prepare import chunk_of_features, load_split
from ggsd_jax.vision_language import maskclip, teachers
from ggsd_jax.vision_language.text import space


def make_config(**overrides) -> ml_collections.ConfigDict:
    config = ml_collections.ConfigDict(
        dict(
            seed=0,
            mode="ggsd",
            data=dict(
                name="synthetic",
                root="",
                prepared="",
                label_set="synthetic",
                train_rooms=2,
                val_rooms=1,
                chunks=2,
                chunk_points=3000,
                voxel_size=0.08,
                augment=True,
                loop=1,
                lists="",
                prepare_workers=0,
            ),
            superpoints=dict(voxel_resolution=0.08, seed_resolution=0.5),
            teacher=dict(name="simulated"),
            text=dict(encoder="stand-in:64", prompt="a {} in a scene"),
        )
    )
    config.update_from_flattened_dict(overrides)
    return config


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    prepare.prepare(make_config(), folder)
    return folder


def stored(scene: Scene) -> Scene:
    """The scene as a record gives it back."""
    features = prepare.record_features(scene.features.shape[1])
    return prepare.decode(features.deserialize_example_np(features.serialize_example(prepare.encode(scene))))


def assert_same_scene(a: Scene, b: Scene):
    for field in dataclasses.fields(Scene):
        x, y = getattr(a, field.name), getattr(b, field.name)
        assert (x is None) == (y is None), field.name
        if x is not None and field.name != "name":
            assert x.dtype == y.dtype, field.name
            np.testing.assert_array_equal(x, y, err_msg=field.name)
    assert a.name == b.name


# --------------------------------------------------------------------------------------- what a dataset holds


def test_training_scenes_are_stored_in_chunks_and_validation_scenes_whole(prepared):
    train, val = load_split(prepared, "train"), load_split(prepared, "val")
    assert (len(train), train.chunks, len(val), val.chunks) == (4, 2, 1, 1)
    assert len({scene.name for scene in train} & {scene.name for scene in val}) == 0
    for scene in range(2):
        first, second = train[2 * scene], train[2 * scene + 1]
        same = dataclasses.replace(second, features=first.features, feature_index=first.feature_index)
        assert_same_scene(first, same)
        assert set(first.feature_index) != set(second.feature_index)
        for chunk in (first, second):
            assert 0 < len(chunk.feature_index) <= 3000
            assert chunk.superpoints.max() > 10 and chunk.features.shape[1] == 64
    assert len(val[0].feature_index) > 0.5 * len(val[0].points)


def test_chunks_agree_with_the_fusion_of_all_points(prepared):
    config, scene = make_config(), load_split(prepared, "train")[1]
    raw = datasets.cut_superpoints(functools.partial(datasets.read_room, 0), config.superpoints.to_dict())
    whole = prepare.add_features(raw, prepare.make_teacher(config))
    kept = stored(whole)
    rows = np.searchsorted(whole.feature_index, scene.feature_index)
    assert_same_scene(dataclasses.replace(kept, features=kept.features[rows], feature_index=scene.feature_index), scene)


def test_preparing_again_reads_and_writes_nothing(prepared, monkeypatch):
    def never(seed):
        raise AssertionError("prepared again")

    monkeypatch.setattr(datasets, "generate_room", never)
    before = {f: f.stat().st_mtime_ns for f in prepared.rglob("*")}
    prepare.prepare(make_config(), prepared)
    prepare.prepare(make_config(seed=7, **{"data.voxel_size": 0.02, "data.loop": 5}), prepared)
    assert before == {f: f.stat().st_mtime_ns for f in prepared.rglob("*")}


def test_nothing_but_the_dataset_is_left(prepared):
    assert {f.name for f in prepared.iterdir()} == {"synthetic", ".lock"}
    assert {f.name for f in (prepared / "synthetic").iterdir()} == {"3.1.0"}


@settings(max_examples=20, deadline=None)
@given(
    num_points=st.integers(1, 50),
    share=st.floats(0, 1),
    channels=st.integers(1, 9),
    absent=st.sets(st.sampled_from(["colors", "normals", "labels", "superpoints"])),
    seed=st.integers(0, 1000),
)
def test_a_scene_survives_a_record_whatever_it_lacks(num_points, share, channels, absent, seed):
    rng = np.random.default_rng(seed)
    index = np.flatnonzero(rng.random(num_points) < share).astype(np.int32)
    fields = dict(
        colors=rng.integers(0, 256, (num_points, 3)).astype(np.uint8),
        normals=rng.standard_normal((num_points, 3)).astype(np.float32),
        labels=rng.integers(0, 256, num_points).astype(np.int32),
        superpoints=rng.integers(-1, 9, num_points).astype(np.int32),
    )
    scene = Scene(
        name="Küche ½",
        points=rng.standard_normal((num_points, 3)).astype(np.float32),
        features=rng.standard_normal((len(index), channels)).astype(np.float16),
        feature_index=index,
        **{field: value for field, value in fields.items() if field not in absent},
    )
    features = dequantize(quantize(scene.features))
    assert_same_scene(stored(scene), dataclasses.replace(scene, features=features))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200), st.integers(1, 250), st.integers(0, 5))
def test_a_chunk_has_features_of_random_points_that_are_seen(num_points, chunk_points, chunk):
    rng = np.random.default_rng(num_points)
    index = np.flatnonzero(rng.random(num_points) < 0.7).astype(np.int32)
    features = rng.standard_normal((len(index), 5)).astype(np.float16)
    scene = Scene("s", np.zeros((num_points, 3), np.float32), features=features, feature_index=index)
    record = prepare.encode(scene)
    chosen = chunk_of_features(record, chunk, np.arange(num_points), chunk_points)
    whole, part = (prepare.decode(r | {"name": b"s"}) for r in (record, chosen))
    assert set(part.feature_index) <= set(index)
    np.testing.assert_array_equal(part.features, whole.features[np.searchsorted(index, part.feature_index)])
    unseen = num_points - len(index)
    assert min(num_points, chunk_points) - unseen <= len(part.features) <= min(len(index), chunk_points)
    again = chunk_of_features(record, chunk, np.arange(num_points), chunk_points)
    np.testing.assert_array_equal(chosen["feature_index"], again["feature_index"])


# ----------------------------------------------------------------------------------- killed, changed, corrupt


def test_after_an_error_in_the_middle_the_next_run_goes_on(tmp_path, tiny_rooms, monkeypatch):
    readable, read = datasets.generate_room, []

    def fails_at_the_third(seed):
        if seed == 2:
            raise ValueError("room 2 is broken")
        return readable(seed)

    def counted(seed):
        read.append(seed)
        return readable(seed)

    monkeypatch.setattr(datasets, "generate_room", fails_at_the_third)
    config = make_config(**{"data.train_rooms": 3})
    with pytest.raises(ValueError, match="room 2 is broken"):
        prepare.prepare(config, tmp_path)
    with pytest.raises(FileNotFoundError, match="--mode=prepare"):
        load_split(tmp_path, "train")
    monkeypatch.setattr(datasets, "generate_room", counted)
    prepare.prepare(config, tmp_path)
    assert read == [2, 1_000_000]
    assert [scene.name for scene in load_split(tmp_path, "train")] == [f"room{i}" for i in (0, 0, 1, 1, 2, 2)]
    assert {f.name for f in tmp_path.iterdir()} == {"synthetic", ".lock"}


def _prepare_until_killed(folder: Path):
    glimpse = generate_room(0, scan_views=2, views=1, size=(40, 30))

    def room(seed: int):
        if seed == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return glimpse._replace(scene=dataclasses.replace(glimpse.scene, name=f"room{seed}"))

    datasets.generate_room = room
    prepare.prepare(make_config(**{"data.train_rooms": 3}), folder)


def test_a_kill_loses_the_scene_it_hits_and_no_other(tmp_path, tiny_rooms, monkeypatch):
    process = multiprocessing.get_context("spawn").Process(target=_prepare_until_killed, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(FileNotFoundError, match="no prepared dataset"):
        load_split(tmp_path, "train")
    readable, read = datasets.generate_room, []
    monkeypatch.setattr(datasets, "generate_room", lambda seed: read.append(seed) or readable(seed))
    prepare.prepare(make_config(**{"data.train_rooms": 3}), tmp_path)
    assert read == [2, 1_000_000] and len(load_split(tmp_path, "train")) == 6
    assert {f.name for f in tmp_path.iterdir()} == {"synthetic", ".lock"}


def _prepare_counting(folder: Path):
    glimpse = generate_room(0, scan_views=2, views=1, size=(40, 30))

    def room(seed: int):
        with (folder / "read.txt").open("a") as file:
            file.write(f"{seed}\n")
        time.sleep(1)
        return glimpse

    datasets.generate_room = room
    prepare.prepare(make_config(), folder)


def test_processes_that_prepare_one_folder_wait_for_each_other(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_prepare_counting, args=(tmp_path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "read.txt").read_text().split() == ["0", "1", "1000000"]
    assert len(load_split(tmp_path, "train")) == 4


def wait_until(condition) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("waited a minute")


def test_scenes_of_other_settings_are_not_gone_on_with(tmp_path, tiny_rooms, monkeypatch):
    def broken(seed):
        raise ValueError("another run begins here")

    config = make_config()
    with monkeypatch.context() as patch:
        # the first scene is done, its records are not
        patch.setattr(prepare, "chunk_of_features", lambda *record: broken(0))
        with pytest.raises(ValueError, match="another run"):
            prepare.prepare(config, tmp_path)
    monkeypatch.setattr(datasets, "generate_room", broken)
    with pytest.raises(ValueError, match="another run begins here"):
        prepare.prepare(make_config(**{"superpoints.seed_resolution": 0.4}), tmp_path)


def test_worker_processes_make_the_same_dataset(prepared, tmp_path):
    prepare.prepare(make_config(**{"data.prepare_workers": 1}), tmp_path)
    for split in ("train", "val"):
        for one, other in zip(load_split(prepared, split), load_split(tmp_path, split), strict=True):
            assert_same_scene(one, other)


def test_a_killed_run_leaves_nothing_that_looks_complete(tmp_path, tiny_rooms):
    half = tmp_path / "synthetic" / "incomplete.ABC123_1.0.0"
    half.mkdir(parents=True)
    (half / "dataset_info.json").write_text("{}")  # killed just before the folder got its name
    (half / "synthetic-train.array_record-00000-of-00001").write_bytes(b"half")
    with pytest.raises(FileNotFoundError, match="no prepared dataset"):
        load_split(tmp_path, "train")
    prepare.prepare(make_config(), tmp_path)
    assert not half.exists()
    assert len(load_split(tmp_path, "train")) == 4


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("data.chunk_points", 4000, "data.chunk_points=3000, the config says 4000"),
        ("superpoints.seed_resolution", 0.3, "superpoints.seed_resolution=0.5, the config says 0.3"),
        ("text.encoder", "stand-in:48", "text.encoder='stand-in:64', the config says 'stand-in:48'"),
    ],
)
def test_a_dataset_of_other_settings_is_refused(prepared, field, value, shown):
    with pytest.raises(ValueError, match=shown) as error:
        prepare.prepare(make_config(**{field: value}), prepared)
    assert str(prepared) in str(error.value) and "delete that folder" in str(error.value)


def test_a_setting_that_did_not_exist_is_refused_too(prepared):
    config = make_config()
    config.teacher.pixel_noise = 0.5
    with pytest.raises(ValueError, match="teacher.pixel_noise=None, the config says 0.5"):
        prepare.prepare(config, prepared)


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "missing"])
def test_a_damaged_file_is_named_with_what_to_do(prepared, tmp_path, damage):
    shutil.copytree(prepared, tmp_path / "copy")
    (file,) = (tmp_path / "copy").rglob("*-train.array_record*")
    content = file.read_bytes()
    file.unlink()
    if damage != "missing":
        new = {"truncated": content[: len(content) // 2], "empty": b"", "garbage": os.urandom(len(content))}
        file.write_bytes(new[damage])
    with pytest.raises(ValueError, match="missing, truncated or corrupt") as error:
        load_split(tmp_path / "copy", "train")[0]
    assert str(file) in str(error.value) and "prepare again" in str(error.value)
    assert load_split(tmp_path / "copy", "val")[0].name == "room1000000"


# --------------------------------------------------------------------------------------- configuration errors


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("data.name", "scanet", "data.name is 'scanet', did you mean 'scannet'"),
        ("teacher.name", "simulate", "teacher.name is 'simulate', did you mean 'simulated'"),
        ("data.label_set", "synthetik", "synthetik"),
        ("data.val_rooms", 0, "data.val_rooms is 0"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, tiny_rooms, field, value, message):
    with pytest.raises(ValueError, match=message):
        prepare.prepare(make_config(**{field: value}), tmp_path)
    assert not [f for f in tmp_path.rglob("*") if f.is_file()]


# ------------------------------------------------------------------------------------------- networks as teachers


def maskclip_config(weights: Path, encoder: Path) -> ml_collections.ConfigDict:
    config = make_config(**{"text.encoder": str(encoder), "superpoints.voxel_resolution": 0.15})
    config.teacher = dict(name="maskclip", weights=str(weights))
    return config


@pytest.fixture
def small_images(monkeypatch) -> None:
    monkeypatch.setitem(teachers.TEACHERS, "maskclip", functools.partial(maskclip.load, short_side=32))


def test_the_features_of_a_network_are_prepared_with_the_space_they_live_in(
    tmp_path, tiny_rooms, small_images, clip_snapshot
):
    snapshot = clip_snapshot()
    out = tmp_path / "out"
    prepare.prepare(maskclip_config(snapshot, snapshot), out)
    scene = load_split(out, "val")[0]
    lengths = np.linalg.norm(scene.features.astype(np.float32), axis=1)
    assert scene.features.shape[1] == 16 and 0.2 < lengths.min()
    assert lengths.max() < 1 + STEP / 2  # unit rows, and at most half a step per channel from being stored

    same, other = tmp_path / "same.npz", clip_snapshot("other", seed=1)
    np.savez(same, embedding=np.eye(16)[:1], names=["chair"], model=space(snapshot))
    prepare.prepare(maskclip_config(snapshot, same), out)  # it is there, and its words may come from anywhere
    with pytest.raises(ValueError, match="text.encoder.*other.*cosines mean nothing"):
        prepare.prepare(maskclip_config(snapshot, other), out)
    with pytest.raises(ValueError, match="teacher.weights='.*clip', the config says '.*other'"):
        prepare.prepare(maskclip_config(other, snapshot), out)
    with pytest.raises(ValueError, match="teacher.name='maskclip', the config says 'simulated'"):
        prepare.prepare(make_config(**{"superpoints.voxel_resolution": 0.15}), out)


def test_cameras_that_see_next_to_nothing_are_warned_of(caplog):
    raw = datasets.read_room(0)
    lift = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1e4], [0, 0, 0, 1]])
    away = [dataclasses.replace(view, pose=lift @ view.pose) for view in raw.views]
    teacher = prepare.make_teacher(make_config())
    with caplog.at_level("WARNING"):
        prepare.add_features(raw, teacher)
        assert "poses" not in caplog.text
        scene = prepare.add_features(raw._replace(views=away), teacher)
    assert len(scene.features) == 0
    assert f"scene '{scene.name}': its views see 0 of {len(scene.points)} points; are the poses" in caplog.text


def test_features_are_averaged_within_the_masks_of_a_view(tmp_path, tiny_rooms):
    config = make_config(**{"superpoints.voxel_resolution": 0.15})
    raw = datasets.read_room(0)
    config.teacher.masks = str(tmp_path / "masks")
    (view,) = raw.views
    with pytest.raises(FileNotFoundError, match="no masks of view"):
        prepare.add_features(raw, prepare.make_teacher(config), config.teacher.masks)
    folder = tmp_path / "masks" / view.name
    folder.mkdir(parents=True)
    Image.new("L", (8, 6), 255).save(folder / "0.png")  # all that is seen is one thing
    scene = prepare.add_features(raw, prepare.make_teacher(config), config.teacher.masks)
    assert len(scene.features) > 50 and (scene.features == scene.features[0]).all()


def test_a_network_and_words_that_do_not_fit_are_refused_before_any_scene(tmp_path, clip_snapshot):
    fine, coarse = clip_snapshot("b16"), clip_snapshot("b32", patch=16)  # both 16 wide
    wrong = [
        (fine, coarse, ValueError, "text.encoder '.*b32' embeds .*ViT-32/16.* features are in that of ViT-32/8"),
        (tmp_path / "gone", fine, FileNotFoundError, "teacher.weights: .*gone: no such folder"),
        ("", fine, ValueError, "teacher.weights is empty: teacher.name='maskclip' needs the folder of a CLIP"),
    ]
    for weights, encoder, kind, message in wrong:
        with pytest.raises(kind, match=message):
            prepare.prepare(maskclip_config(weights, encoder), tmp_path / "out")
    assert not (tmp_path / "out").exists()
