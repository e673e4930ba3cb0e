import dataclasses
import io
import shutil
import socket
import threading
import time
import types
import weakref

import numpy as np
import pytest
from PIL import Image

from data.labels import LABEL_SETS
from data.ply import read_ply_columns
from data.scene import Scene
from data.synthetic import SYNTHETIC
from ggsd_jax import inference, render, viewer


@pytest.fixture(scope="module")
def model(model_dir) -> inference.Model:
    return inference.load(model_dir)


@pytest.fixture(scope="module")
def scene() -> Scene:
    rng = np.random.default_rng(0)
    points = (rng.uniform(0, 1, (800, 3)) * [3, 2, 0.5]).astype(np.float32)
    labels = rng.integers(0, 15, 800).astype(np.int32)
    labels[:50] = 255
    return Scene(
        "room",
        points,
        colors=rng.integers(0, 255, (800, 3), np.uint8),
        labels=labels,
        superpoints=rng.integers(-1, 20, 800).astype(np.int32),
        features=rng.standard_normal((300, 32)).astype(np.float16),
        feature_index=np.arange(0, 600, 2).astype(np.int32),
    )


@pytest.fixture(scope="module")
def answers(model, scene) -> viewer.Answers:
    return viewer.Answers(model, scene, SYNTHETIC)


def test_a_query_is_answered_as_the_model_does(answers, model, scene):
    expected = model.query(scene.points, ["red chair"], ["stool", "sofa"])[:, 0]
    np.testing.assert_allclose(answers.ask("red chair", ["stool", "sofa"]), expected, atol=1e-5)
    np.testing.assert_array_equal(answers.predicted, model.segment(scene.points, SYNTHETIC.classes)[0])


def test_a_query_that_is_excluded_too_is_found_nowhere(answers):
    for word in SYNTHETIC.classes:
        assert answers.ask(word, [word, "bed", word]).max() <= 0.5


def test_a_clicked_point_is_most_like_itself_and_has_the_labels_nearest_to_it(answers, model, scene):
    scores = answers.similar(17)
    assert scores[17] == scores.max() and scores[17] > 0.5
    similarity = model.similarity(scene.points, model.embed(SYNTHETIC.classes))[17]
    labels = answers.nearest_labels(17)
    assert [name for name, _ in labels] == [SYNTHETIC.classes[i] for i in np.argsort(-similarity)[:5]]


def test_answers_that_nobody_holds_are_gone(model, scene):
    answers = viewer.Answers(model, scene, SYNTHETIC)
    for mode in answers.modes:
        answers.paint(mode, None, 0.5)
    held = weakref.ref(answers)
    del answers
    assert held() is None


def test_only_what_a_scan_has_can_be_shown(answers, model, scene):
    assert len(answers.modes) == 7
    bare = viewer.Answers(model, Scene("bare", scene.points), SYNTHETIC)
    assert bare.modes == [viewer.HEAT, viewer.SEGMENTATION]
    other = viewer.Answers(model, scene, LABEL_SETS["scannet20"])
    assert viewer.TRUTH in other.modes
    few = viewer.Answers(model, scene, viewer.LabelSet("few", ("a", "b"), np.zeros((2, 3), np.uint8)))
    assert viewer.TRUTH not in few.modes and viewer.DIFFERENCE not in few.modes


def test_every_mode_paints_what_it_says(answers, scene):
    scores = answers.ask("lamp")
    painted = {mode: answers.paint(mode, scores, 0.5)[0] for mode in answers.modes}
    assert all(colors.shape == (800, 3) and colors.dtype == np.uint8 for colors in painted.values())
    np.testing.assert_array_equal(painted[viewer.TRUTH], SYNTHETIC.colorize(scene.labels))
    np.testing.assert_array_equal(painted[viewer.SEGMENTATION], SYNTHETIC.colorize(answers.predicted))
    right = (painted[viewer.DIFFERENCE] == viewer._RIGHT).all(1)
    np.testing.assert_array_equal(right, answers.predicted == scene.labels)
    unseen = np.setdiff1d(np.arange(800), scene.feature_index)
    assert not painted[viewer.FUSION][unseen].any() and painted[viewer.FUSION][scene.feature_index].any()
    one = scene.superpoints == 3
    assert len(np.unique(painted[viewer.SUPERPOINTS][one], axis=0)) == 1
    cold = scores <= 0.5
    np.testing.assert_array_equal(painted[viewer.HEAT][cold], viewer.query.greyed(scene)[cold])


def test_the_legend_names_the_classes_that_are_there_with_their_share(answers):
    _, legend = answers.paint(viewer.SEGMENTATION, None, 0.5)
    shares = np.bincount(answers.predicted, minlength=15) / 800
    assert len(legend) == (shares > 0).sum()
    best = int(shares.argmax())
    assert next(iter(legend)) == f"{SYNTHETIC.classes[best]} {shares[best]:.1%}"


def test_the_download_has_every_point_with_label_and_score(answers, scene, tmp_path):
    scores = answers.ask("bed")
    (tmp_path / "x.ply").write_bytes(answers.ply(scene.colors, scores))
    columns = read_ply_columns(tmp_path / "x.ply")
    np.testing.assert_array_equal(columns["label"], answers.predicted)
    np.testing.assert_array_equal(columns["score"], scores)
    np.testing.assert_array_equal(columns["x"], scene.points[:, 0])


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  red\tchair\n", "red chair"),
        ("a\x00\x1b[31mb\u202e", "a [31mb"),
        ("x" * 10_000_000, "x" * viewer.MAX_QUERY),
        ("\x00\x07", ""),
    ],
)
def test_a_query_is_cleaned(text, cleaned):
    assert viewer.clean(text) == cleaned


def test_a_click_means_the_first_point_on_its_ray():
    points = np.array([[0, 0, 5], [0.01, 0, 3], [2, 0, 1], [0, 0, -1]], float)
    assert viewer.picked_point(points, (0, 0, 0), (0, 0, 2)) == 1
    assert viewer.picked_point(points, (0, 0, 0), (0, 1, 0)) is None


def test_large_scans_are_thinned_and_small_ones_are_not():
    assert len(viewer.sample(10, 20)) == 10
    rows = viewer.sample(1000, 100)
    assert len(rows) == 100 and (np.diff(rows) > 0).all() and rows[-1] > 800


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=nowhere", "--scene={scans}"], "nowhere holds no model"),
        (["--model={model}", "--scene=nowhere.ply"], "no such scan"),
        (["--model={model}", "--scene={scans}", "--labels=nyu4"], "did you mean 'nyu40'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(model_dir, scene, tmp_path, arguments, message):
    scene.save_npz(tmp_path / "room.npz")
    with pytest.raises(SystemExit, match=message):
        viewer.main([a.format(model=model_dir, scans=tmp_path) for a in arguments])


def test_other_machines_and_other_files_are_out_of_reach(address):
    port = int(address.rsplit(":", 1)[1])
    with pytest.raises(ConnectionRefusedError):  # what listens on every interface answers here too
        socket.create_connection(("127.0.0.2", port), timeout=10)
    for path in ("/../../../../../../etc/passwd", "/%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd"):
        with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
            reply = connection.makefile("rb").read()
        assert b"root:" not in reply and reply.startswith(b"HTTP/1.1 ")


# --------------------------------------------------------------------------------------- in a real browser


@pytest.fixture(scope="module")
def address(model, scene, tmp_path_factory):
    """Address of a served page with two scans."""
    pytest.importorskip("viser")
    folder = tmp_path_factory.mktemp("scans")
    scene.save_npz(folder / "room.npz")
    Scene("bare", scene.points).save_npz(folder / "bare.npz")
    files = viewer.query.scene_files([folder])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = viewer.serve(model, files, SYNTHETIC, host="127.0.0.1", port=port, unit=None, max_sent=500)
    yield f"http://127.0.0.1:{server.get_port()}"
    server.stop()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium or google-chrome on this machine")
    with playwright.sync_playwright() as running:
        arguments = ["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
        opened = running.chromium.launch(executable_path=chromium, args=arguments)
        yield opened
        opened.close()


def open_page(browser, address):
    page = browser.new_page(viewport={"width": 900, "height": 700})
    page.goto(address)
    page.get_by_text("800 points, 500 of them drawn").wait_for(timeout=60_000)
    return page


def field(page, label):
    return page.locator(f'xpath=//*[text()="{label}"]/following::input[1]')


def ask(page, words):
    field(page, "Find").fill(words)
    field(page, "Find").press("Enter")


def heat_pixels(page) -> np.ndarray:
    """Rows (x, y) of the pixels in a colour of heat, left of the panel; grey, white and the panel's blue are none."""
    image = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB")).astype(int)[:, :540]
    hot = (image[..., 0] - image[..., 1] > 40) & (image[..., 0] > image[..., 2])
    return np.argwhere(hot)[:, ::-1]


def test_in_a_browser_a_query_paints_the_heat_map_and_a_click_names_the_point(browser, address, answers):
    page = open_page(browser, address)
    word = max(SYNTHETIC.classes, key=lambda name: (answers.ask(name) > 0.5).mean())
    ask(page, word)
    share = (answers.ask(word) > 0.5).mean()
    page.get_by_text(f'"{word}": {share:.1%} of the points').wait_for(timeout=20_000)
    assert field(page, "Show").input_value() == viewer.HEAT
    deadline = time.monotonic() + 20
    while len(heat_pixels(page)) < 50 and time.monotonic() < deadline:
        time.sleep(0.5)
    hot = heat_pixels(page)
    assert len(hot) >= 50
    for x, y in hot[:: len(hot) // 4].tolist():
        page.mouse.click(x, y, delay=50)
        time.sleep(0.3)
    page.get_by_text("The heat map shows what is like it").wait_for(timeout=20_000)
    page.close()


def test_words_that_are_typed_key_by_key_keep_the_spaces_between_them(browser, address):
    page = open_page(browser, address)
    field(page, "Find").click()
    page.keyboard.type("red chair by the wall", delay=120)
    page.get_by_text('"red chair by the wall":').wait_for(timeout=20_000)
    assert field(page, "Find").input_value() == "red chair by the wall"
    page.close()


def test_hostile_input_and_two_browsers_break_nothing(browser, address):
    first, second = open_page(browser, address), open_page(browser, address)
    first.evaluate(
        """text => {const e = [...document.querySelectorAll('input')].find(e => e.type === 'text' && e.value === '');
        Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set.call(e, text);
        e.dispatchEvent(new Event('input', {bubbles: true}))}""",
        "y" * 10_000_000,
    )
    ask(second, "<img src=x onerror=alert(1)>\x07 chair")
    second.get_by_text('"<img src=x onerror=alert(1)> chair"').wait_for(timeout=20_000)
    assert second.locator("img[src=x]").count() == 0
    ask(first, "lamp")
    first.get_by_text('"lamp":').wait_for(timeout=40_000)
    assert "chair" in field(second, "Find").input_value()
    first.close()
    second.close()


class Client:  # records what a page does to a browser
    def __init__(self):
        self.gui = self.scene = self.camera = self

    def __getattr__(self, name):
        if name.startswith("add_"):
            return lambda *args, **kwargs: Handle(args[-1] if name != "add_dropdown" else kwargs["initial_value"])
        return lambda *args, **kwargs: lambda action: action


class Handle:
    def __init__(self, value):
        self.value, self.content, self.removed = value, "", False

    def remove(self):
        self.removed = True

    def on_update(self, action):
        self.act = action

    on_click = on_update


def test_of_what_is_not_meant_blanks_do_not_count_and_what_is_too_much_is_said(model, scene):
    answers = viewer.Answers(model, scene, SYNTHETIC)
    page = viewer.Page(Client(), ["room"], "room", lambda name: answers, 100)
    page.words.value, page.without.value = "sofa", ",, " + "lamp,lamp, " * 30 + "sofa"
    page.ask(None)
    assert not (page.scores > 0.5).any() and "Only the first" not in page.said.content
    page.without.value = ",".join(f"lamp{i}" for i in range(viewer.MAX_WITHOUT + 1))
    page.ask(None)
    assert f"Only the first {viewer.MAX_WITHOUT} of Without are used" in page.said.content


def test_with_more_than_255_labels_points_without_one_are_none(model, scene):
    words = tuple(f"word {i}" for i in range(300))
    labels = viewer.LabelSet("many", words, render.distinct_colors(300))
    given = np.full(len(scene.points), 255, np.int32)
    given[:4] = 3
    features, index = np.ones((2, model.embed(["chair"]).shape[1]), np.float16), np.array([0, 5], np.int32)
    partly = dataclasses.replace(scene, labels=given, features=features, feature_index=index)
    answers = viewer.Answers(model, partly, labels)
    assert list(answers.paint(viewer.TRUTH, None, 0.5)[1]) == [f"word 3 {4 / len(given):.1%}"]
    (name,) = answers.paint(viewer.FUSION, None, 0.5)[1]
    assert name.endswith(f"{2 / len(given):.1%}")


def test_a_scan_is_named_by_its_place_in_the_list_and_never_by_a_path(model, scene, tmp_path):
    """What a browser says it has chosen is not believed."""

    known = {"room": viewer.Answers(model, scene, SYNTHETIC)}

    def answers_of(name):
        if name not in known:
            raise ValueError(f"there is no scan {name!r}")
        return known[name]

    page = viewer.Page(Client(), ["room"], "room", answers_of, 100)
    page.scan.value = "../../etc/passwd"
    page.scan.act(None)
    assert "there is no scan" in page.said.content and page.answers is known["room"]
    page.mode.value = "<b>"
    page.mode.act(None)
    assert "cannot be shown by &#x27;&lt;b&gt;" in page.said.content
    threads = [threading.Thread(target=page.words.act, args=(None,)) for _ in range(8)]
    page.words.value = "x" * 10_000_000
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert page.words.value == "x" * viewer.MAX_QUERY and page.acting == 0


def test_a_scan_that_cannot_be_opened_leaves_the_one_before(model, scene):
    known = {name: viewer.Answers(model, dataclasses.replace(scene, name=name), SYNTHETIC) for name in ("one", "two")}

    def answers_of(name):
        if name not in known:
            raise OSError(f"{name}.ply: truncated")
        return known[name]

    page = viewer.Page(Client(), ["broken", "one", "two"], "broken", answers_of, 100)
    page.words.value = "chair"
    page.words.act(None)  # nothing to ask
    assert "truncated" in page.said.content and page.scores is None
    page.scan.value = "one"
    page.scan.act(None)
    asked_of_one = page.scores  # what stands in the box is asked of the new scan
    np.testing.assert_array_equal(asked_of_one, known["one"].ask("chair"))
    page.scan.value = "broken"
    page.scan.act(None)
    assert "truncated" in page.said.content and page.scan.value == "one" and page.answers is known["one"]


def test_a_click_stands_until_something_is_asked_and_its_mark_goes_with_it(model, scene):
    known = {name: viewer.Answers(model, dataclasses.replace(scene, name=name), SYNTHETIC) for name in ("one", "two")}
    page = viewer.Page(Client(), ["one", "two"], "one", known.__getitem__, 100)
    click = types.SimpleNamespace(ray_origin=page.drawn[5] + [0, 0, 5], ray_direction=[0, 0, -1])

    def clicked():
        page._guarded(page.click)(click)
        assert "is like it" in page.said.content and not page.marker.removed
        return page.marker, page.scores

    mark, scores = clicked()
    page.without.value = "lamp"
    page.without.act(None)  # excludes nothing from a click
    assert page.scores is scores and "is like it" in page.said.content
    page.words.value = "chair"
    page.words.act(None)
    assert mark.removed and page.marker is None and "chair&quot;:" in page.said.content
    page.words.value = ""
    page.words.act(None)
    assert page.scores is None and page.said.content.count("Type what you look for") == 1
    mark, _ = clicked()
    page.scan.value = "two"
    page.scan.act(None)
    assert mark.removed and page.scores is None
    np.testing.assert_array_equal(page.client.position, viewer.viewpoint(scene.points))


def test_the_share_that_is_said_follows_the_threshold(answers):
    page = viewer.Page(Client(), ["room"], "room", lambda name: answers, 100)
    page.words.value = "bed"
    page.words.act(None)
    for value, kept in ((0.2, 0.2), (7.0, 1.0), (-3.0, 0.0)):
        page.threshold.value = value
        page.threshold.act(None)
        assert page.threshold.value == kept
        assert f"{(answers.ask('bed') > kept).mean():.1%} of the points" in page.said.content


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--host=no.such.host.invalid", "no address of this machine"),
        ("--host=10.99.99.99", "no address of this machine"),
        ("--port=99999", "ports are 1 to 65535"),
        ("--points=0", "draw at least one"),
    ],
)
def test_a_page_that_cannot_be_served_is_refused_at_once(model_dir, scene, tmp_path, argument, message):
    scene.save_npz(tmp_path / "room.npz")
    with pytest.raises(SystemExit, match=message):
        viewer.main([f"--model={model_dir}", f"--scene={tmp_path / 'room.npz'}", argument])
