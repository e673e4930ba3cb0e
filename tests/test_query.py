import numpy as np
import pytest
from PIL import Image

from data.labels import LABEL_SETS
from data.ply import read_ply_columns, write_ply
from data.scene import Scene
from ggsd_jax import query


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two scans: a PLY with colours, and an .npz without."""
    path = tmp_path_factory.mktemp("scans")
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        points = (rng.uniform(0, 1, (900, 3)) * [3, 2, 0.5]).astype(np.float32)
        if name == "a":
            write_ply(path / "a.ply", points, colors=rng.integers(0, 255, points.shape, np.uint8))
        else:
            Scene("another name inside", points).save_npz(path / "b.npz")
    return path


def ask(model_dir, *arguments):
    query.main([f"--model={model_dir}", *map(str, arguments)])


def blob(rng, centre, count=100):
    return rng.uniform(-0.2, 0.2, (count, 3)) + centre


def test_regions_are_what_is_connected_ordered_by_evidence():
    rng = np.random.default_rng(0)
    points = np.concatenate(
        [blob(rng, [0, 0, 0]), blob(rng, [0.3, 0, 0]), blob(rng, [3, 0, 0]), blob(rng, [6, 0, 0], 5)]
    )
    scores = np.full(len(points), 0.9)
    scores[200:300] = 0.95
    scores[:10] = 0.3
    large, small = query.regions(points, scores, 0.5, cell=0.1)  # five points are a speck
    np.testing.assert_array_equal(large.points, np.arange(10, 200))
    np.testing.assert_array_equal(small.points, np.arange(200, 300))
    np.testing.assert_allclose(small.centre, [3, 0, 0], atol=0.02)
    np.testing.assert_allclose(large.extent, [0.7, 0.4, 0.4], atol=0.05)
    assert large.score == pytest.approx(0.9) and small.score == pytest.approx(0.95)
    assert large.evidence > small.evidence


def test_evidence_counts_area_and_not_how_densely_it_was_scanned():
    rng = np.random.default_rng(1)
    thin, dense = (rng.uniform(0, 1, (count, 3)) * [1, 1, 0] for count in (2000, 20000))
    evidence = [query.regions(p, np.full(len(p), 0.8), 0.5, cell=0.1)[0].evidence for p in (thin, dense)]
    assert evidence == pytest.approx([0.3, 0.3], rel=0.01)


def test_nothing_found_is_no_region():
    assert query.regions(np.zeros((5, 3)), np.zeros(5), 0.5, cell=0.1) == []
    np.testing.assert_array_equal(query.winners(np.array([[0.2, 0.4], [0.7, 0.6]]), 0.5), [-1, 0])


def test_a_query_prints_regions_ranks_scenes_and_stores_the_answer(model_dir, folder, tmp_path, capsys):
    ask(model_dir, f"--scene={folder}", "chair", "floor", "--threshold=0.3", f"--out={tmp_path}", "--without=lamp")
    printed = capsys.readouterr().out
    assert '"chair":' in printed and "a: 900 points" in printed and "b: 900 points" in printed
    assert '"chair" is in' in printed and "of 2 scenes" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        f"{n}.{e}" for n in "ab" for e in ("ply", "npz", "png")
    )
    stored, columns = np.load(tmp_path / "a.npz"), read_ply_columns(tmp_path / "a.ply")
    assert stored["scores"].shape == (900, 2) and list(stored["words"]) == ["chair", "floor"]
    np.testing.assert_allclose(columns["score_1"], stored["scores"][:, 1])
    np.testing.assert_array_equal(stored["ids"], query.winners(stored["scores"], 0.3))
    painted = np.stack([columns[c] for c in ("red", "green", "blue")], 1)[stored["ids"] == 0]
    assert len(painted) and (painted == query.render.distinct_colors(2)[0]).all()
    with Image.open(tmp_path / "b.png") as image:
        assert image.width == 4 * 480  # input, found, and a heat map for each query


def test_a_search_through_a_folder_goes_on_past_a_broken_scan_and_names_it(model_dir, folder, tmp_path, capsys):
    scans = tmp_path / "scans"
    scans.mkdir()
    (scans / "a.ply").write_text("ply\nformat ascii 1.0\n")
    (scans / "b.npz").write_bytes((folder / "b.npz").read_bytes())
    stray = np.vstack([np.random.default_rng(0).uniform(0, 3, (900, 3)), [[1e6, 0, 0]]])
    Scene("c", stray.astype(np.float32)).save_npz(scans / "c.npz")
    (scans / "d.ply").symlink_to("nowhere.ply")
    (scans / "e.ply").mkdir()
    (scans / "._b.npz").write_bytes(b"what macOS keeps beside a file")
    with pytest.raises(SystemExit, match=r"3 of 4 scans left out:\n.*a.ply.*\n.*c.npz: points row 900.*\n.*d.ply"):
        ask(model_dir, f"--scene={scans}", "chair", "piano", f"--out={tmp_path / 'out'}")
    printed = capsys.readouterr().out
    assert "b: 900 points" in printed and (tmp_path / "out/b.ply").is_file()
    assert 'knows no word of "piano"' in printed and 'word of "chair"' not in printed


@pytest.mark.parametrize("labels", ["scannet20", "words.txt"])
def test_every_point_gets_a_label_of_a_set_or_of_a_file(model_dir, folder, tmp_path, capsys, labels):
    if labels == "words.txt":
        labels = tmp_path / labels
        labels.write_text("\ufeffstove\n\n# warm\n  red chair \nstove\n", encoding="utf-8")
    ask(model_dir, f"--scene={folder / 'b.npz'}", f"--labels={labels}", f"--out={tmp_path / 'out'}")
    stored, words = np.load(tmp_path / "out" / "b.npz"), query.word_list(str(labels)).classes
    assert words in (LABEL_SETS["scannet20"].classes, ("stove", "red chair"))
    assert stored["scores"].shape == (900, len(words))
    np.testing.assert_array_equal(stored["ids"], stored["scores"].argmax(1))
    assert words[stored["ids"][0]] in capsys.readouterr().out


@pytest.mark.parametrize(("unit", "factor"), [("mm", 1000), ("cm", 100)])
def test_a_scan_in_other_units_is_questioned_and_converted(tmp_path, unit, factor):
    points = np.random.default_rng(0).uniform(0, 1, (500, 3)).astype(np.float32) * [4, 3, 2.4]
    Scene("room", (points * factor).astype(np.float32)).save_npz(tmp_path / "room.npz")
    with pytest.raises(ValueError, match=f"large for a scan.* --unit={unit} "):
        query.read_scene(tmp_path / "room.npz")
    np.testing.assert_allclose(query.read_scene(tmp_path / "room.npz", unit).points, points, atol=1e-5)
    assert query.read_scene(tmp_path / "room.npz", "m").points.max() > 100


def test_a_word_said_twice_is_one_and_words_may_stand_anywhere(model_dir, folder, tmp_path):
    ask(model_dir, "chair", f"--scene={folder / 'a.ply'}", f"--out={tmp_path}", "lamp", " chair")
    assert list(np.load(tmp_path / "a.npz")["words"]) == ["chair", "lamp"]


def test_a_folder_may_hold_a_folder_for_each_scan(model_dir, folder, tmp_path, capsys):
    for scene in ("attic", "hall"):
        (tmp_path / "scans" / scene).mkdir(parents=True)
        (tmp_path / "scans" / scene / "cloud.ply").symlink_to(folder / "a.ply")
    ask(model_dir, f"--scene={tmp_path}/scans", "chair", f"--out={tmp_path / 'out'}")
    assert '"chair" is in ' in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"attic.png", "hall.png"}


def test_a_link_to_itself_is_one_broken_scan_among_others(model_dir, folder, tmp_path, capsys):
    scans = tmp_path / "scans"
    scans.mkdir()
    (scans / "a.ply").symlink_to(folder / "a.ply")
    (scans / "loop.ply").symlink_to(scans / "loop.ply")
    with pytest.raises(SystemExit, match="(?s)1 of 2 scans left out:.*loop.ply"):
        ask(model_dir, f"--scene={scans}", "chair", f"--out={tmp_path / 'out'}")
    assert "a: 900 points" in capsys.readouterr().out


def test_labels_that_are_no_classes_do_not_matter(tmp_path):
    header = "VERSION .7\nFIELDS x y z label\nSIZE 4 4 4 4\nTYPE F F F U\nCOUNT 1 1 1 1\nWIDTH 2\nHEIGHT 1\nPOINTS 2\n"
    (tmp_path / "b.pcd").write_text(header + "DATA ascii\n0 0 0 1000\n1 1 1 0\n")
    assert query.read_scene(tmp_path / "b.pcd").points.tolist() == [[0, 0, 0], [1, 1, 1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scene=nowhere.ply", "chair"], "nowhere.ply: no such scan"),
        (["--scene={folder}/a.ply"], "say what to look for"),
        (["--scene={folder}/a.ply", "chair", "  "], "a query is empty"),
        (["--scene={folder}/a.ply", "T\udcc3\udcbcr"], r"a query 'T.udcc3.udcbcr' is not UTF-8; .* LC_ALL=C.UTF-8"),
        (["--scene={folder}/a.ply", "chair", "--labels=nyu40"], "one of the two"),
        (["--scene={folder}/a.ply", "chair", "--without= "], "--without is empty"),
        (["--scene={folder}/a.ply", "--labels=nyu4"], "did you mean 'nyu40'"),
        (["--scene={folder}/a.ply", "--labels=sintetic"], "did you mean 'synthetic'"),
        (["--scene={folder}/a.ply", "--labels=lost.txt"], "lost.txt: no such list"),
        (["--scene={folder}/a.ply", "chair", "--threshold=50"], "between 0 and 1"),
        (["--scene={folder}", "chair", "--out={folder}"], "would be overwritten"),
        (["--scene={folder}/linked/c.ply", "chair", "--out={folder}/linked"], "would be overwritten"),
        (["--scene={folder}", "chair", "--out={folder}/a.ply"], "a.ply is a file: name a folder"),
        (["--scene={folder}/a.ply", "--labels=nyu40", "--without=lamp"], "nothing about --labels"),
        (["--scene=pyproject.toml", "chair"], "expected a .ply or .pcd or .npz or .xyz file"),
        (["--scene={folder}/a.ply", "chair", "--model=tests"], "holds no model"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(model_dir, folder, arguments, message):
    linked = folder / "linked"
    if not linked.exists():
        linked.mkdir()
        (linked / "c.ply").symlink_to(folder / "a.ply")
    with pytest.raises(SystemExit, match=message):
        ask(model_dir, *[a.format(folder=folder) for a in arguments])


def test_a_folder_that_cannot_be_written_is_no_scans_fault(model_dir, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(query.os, "access", lambda path, mode: False)
    with pytest.raises(SystemExit, match=r"PermissionError: --out=.* cannot be written"):
        ask(model_dir, f"--scene={folder / 'a.ply'}", "chair", f"--out={tmp_path}")


def test_labels_that_the_stand_in_does_not_know_are_told(model_dir, folder, tmp_path, capsys):
    labels = tmp_path / "words.txt"
    labels.write_text("\n".join(["chair", *(f"qwx{i}" for i in range(12))]))
    ask(model_dir, f"--scene={folder / 'b.npz'}", f"--labels={labels}", f"--out={tmp_path / 'out'}")
    assert 'knows no word of "qwx0", "qwx1",' in capsys.readouterr().out


def test_help_teaches_with_an_example(capsys):
    with pytest.raises(SystemExit):
        query.main(["--help"])
    assert '--scene=room.ply "chair"' in capsys.readouterr().out
