import importlib
import importlib.metadata
import pathlib

import numpy as np
import pytest
from test_data_openscene import COLORS, LABELS, POINTS, save

from data.ply import write_ply
from ggsd_jax import doctor, inference


def report(capsys, *paths):
    """Exit status and printed lines."""
    with pytest.raises(SystemExit) as stopped:
        doctor.main([str(path) for path in paths])
    return stopped.value.code, capsys.readouterr().out


@pytest.mark.parametrize(("version", "state"), [((3, 10), "FAIL"), ((3, 11), "ok"), ((3, 13), "ok"), ((3, 14), "FAIL")])
def test_pythons_without_pins_are_refused(version, state):
    assert doctor.python(version).state == state


def test_missing_packages_fail_and_other_versions_are_noted(tmp_path):
    (tmp_path / "requirements.txt").write_text(
        "# why\njax==1.0; python_version >= '3.0'\njax==0.1; python_version < '3.0'\nnumpy==2.0\nflax==3.0\n"
    )
    versions = {"jax": "1.0", "numpy": "1.0"}

    def installed(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    missing, other = doctor.packages(tmp_path / "requirements.txt", installed)
    assert (missing.state, missing.what) == ("FAIL", "not installed: flax")
    assert other.state == "note" and "numpy 1.0 (pinned==2.0)" in other.what and "jax" not in other.what
    versions |= {"numpy": "2.0", "flax": "3.0"}
    assert [check.state for check in doctor.packages(tmp_path / "requirements.txt", installed)] == ["ok"]


@pytest.mark.parametrize(
    ("platform", "capability", "nvidia", "state", "says"),
    [
        ("cpu", None, False, "ok", "compiled by numba"),
        ("tpu", None, False, "ok", "run by XLA"),
        ("cpu", None, True, "note", "does not use"),
        ("gpu", "9.0", True, "ok", "Pallas kernels can run"),
        ("gpu", "10.0", True, "ok", "Pallas kernels can run"),
        ("gpu", "7.5", True, "note", "XLA is used"),
        ("gpu", "gfx90a", False, "note", "XLA is used"),
    ],
)
def test_pallas_needs_an_nvidia_gpu_of_capability_8(platform, capability, nvidia, state, says):
    check = doctor.pallas(platform, capability, nvidia)
    assert check.state == state and says in check.what


def test_a_full_disk_fails_a_small_one_is_noted():
    assert [doctor.disk(free=size).state for size in (int(5e8), int(5e9), int(5e10))] == ["FAIL", "note", "ok"]


def test_without_a_home_or_a_place_for_what_numba_compiles_the_variable_to_set_is_named(monkeypatch, tmp_path):
    def fails(*_):
        raise RuntimeError("cannot cache function 'f': no locator available")

    with monkeypatch.context() as patch:
        patch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        patch.setattr(pathlib.Path, "home", fails)
        assert doctor.writable().advice == "set JAX_COMPILATION_CACHE_DIR"
        inference.keep_compiled_programs()  # goes without
    assert doctor.compiled_loops().state == "ok"
    monkeypatch.setattr(importlib, "import_module", fails)
    check = doctor.compiled_loops()
    assert check.state == "FAIL" and "NUMBA_CACHE_DIR" in check.advice


def test_this_machine_computes_and_paths_are_told_apart(model_dir, tmp_path, capsys):
    write_ply(tmp_path / "room.ply", np.zeros((3, 3), np.float32))
    np.savez(tmp_path / "words.npz", embedding=np.eye(2, 8), names=np.array(["chair", "wall"]))
    status, printed = report(capsys, model_dir, tmp_path / "room.ply", tmp_path / "words.npz")
    assert "ok    jax" in printed and "MinkUNet14A" in printed
    assert "room.ply: 1 scan, 3 points" in printed and "words.npz: a text encoder, 8 wide" in printed
    assert status == int("FAIL" in printed)


def test_every_broken_path_fails_with_the_reason(shared, tmp_path, capsys):
    (tmp_path / "cut.ply").write_bytes(b"ply\nformat ascii 1.0\n")
    (tmp_path / "scannetv2_val.txt").write_text("scene0000_00\n")
    (tmp_path / "scannetv2_train.txt").write_text("")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "garbage.npz").write_bytes(b"hello")
    golden = shared / "golden/narrow_ckpt.pth.tar"
    status, printed = report(capsys, tmp_path / "lost", tmp_path / "cut.ply", tmp_path, tmp_path / "notes.txt", golden)
    assert status == 1
    assert report(capsys, "x" * 300)[0] == 1
    assert "mend the file" in report(capsys, tmp_path / "garbage.npz")[1]
    for says in ("lost: there is no such", "cut.ply: ValueError", "none of its 1 scenes", "notes.txt: neither a model"):
        assert says in printed
    lines = printed.splitlines()
    failing = [i for i, line in enumerate(lines) if line.startswith("FAIL")]
    assert len(failing) >= 4 and all(lines[i + 1].startswith("      -> ") for i in failing)
    assert "OpenScene checkpoint, MinkUNet18A, 96 channels" in printed


def test_data_sets_and_scans_of_every_kind_are_told_apart(tmp_path):
    def made(*parts: str) -> None:
        for part in parts:
            (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / part).write_text("0 0 0\n")

    made("nu/v1.0-mini/sample.json", "nu/samples/x", "nu/lidarseg/x", "kitti/sequences/00/velodyne/000000.bin")
    made("mp/17DRP/region_segmentations/region0.ply", "rep/office0_mesh.ply", "scans/a.XYZ", "scans/b.xyz")
    made("own/kitchen/cloud.xyz", "own/kitchen/images/a.jpg", "own/hall/cloud.xyz", "bad/sequences/00/x")
    expected = {
        "nu": "nuScenes, v1.0-mini",
        "kitti": "SemanticKITTI, 1 scan",
        "mp": "Matterport3D, 1 building",
        "rep": "Replica, 1 scene",
        "scans": "2 scans, 2 points",
        "own": "2 scenes of your own, 1 with images, the first of 1 points",
    }
    checks = {name: doctor.path(tmp_path / name) for name in expected}
    assert {name: check.what for name, check in checks.items()} == {
        n: f"{tmp_path / n}: {w}" for n, w in expected.items()
    }
    made("scans/c.ply")
    broken = doctor.path(tmp_path / "scans")
    assert broken.state == "FAIL" and "1 of 3 scans cannot be used: " in broken.what and "c.ply" in broken.what
    broken = doctor.path(tmp_path / "bad")
    assert broken.state == "FAIL" and "BUILD.md" in broken.advice


def test_openscenes_downloads_are_counted_and_the_text_is_told(tmp_path):
    clouds, features = tmp_path / "scannet_3d", tmp_path / "scannet_multiview_openseg"
    for folder in (clouds / "train", clouds / "val", features):
        folder.mkdir(parents=True)
    for split, name in (("train", "a"), ("train", "b"), ("val", "c")):
        save(clouds / split / f"{name}_vh_clean_2.pth", (POINTS, COLORS, LABELS))
    save(features / "a_0.pt", {"feat": np.zeros((3, 768), np.float16), "mask_full": LABELS > -1})
    said = "OpenScene's clouds, 3 scenes, the first of 4 points"
    assert doctor.path(clouds).state == "ok" and said in doctor.path(clouds).what
    said = "OpenScene's 2D features, 1 file, 768 channels, for the text of CLIP ViT-L/14@336px"
    assert doctor.path(features).state == "ok" and said in doctor.path(features).what
    clip = tmp_path / "clip"  # OpenAI's network is a .pt file, too
    clip.mkdir()
    (clip / "ViT-B-32.pt").touch()
    (clip / "vocab.json").touch()
    assert "CLIP's folder" in doctor.path(clip).advice
    for file, path in ((clouds / "train/a_vh_clean_2.pth", clouds), (features / "a_0.pt", features)):
        file.write_bytes(file.read_bytes()[:100])
        assert doctor.path(path).state == "FAIL" and "run OpenScene's scripts" in doctor.path(path).advice


def test_a_run_that_was_killed_goes_on(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text('{"stage1_epochs": 7}')
    assert "an unfinished run, no step of the training saved" in doctor.path(tmp_path).what
    for step in ("900", "1000", "1100.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / step).mkdir()
    check = doctor.path(tmp_path)
    assert check.state == "ok" and "saved at step 1,000; the same command goes on" in check.what
