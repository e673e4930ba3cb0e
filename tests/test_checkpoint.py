import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ggsd_jax import checkpoint


def state(width: int = 4):
    params = {"w": jnp.arange(width, dtype=jnp.float32)}
    return {"step": jnp.int32(7), "params": params, "opt_state": optax.adam(1e-3).init(params)}


def test_a_saved_state_comes_back_bit_for_bit(tmp_path):
    manager = checkpoint.manager(tmp_path, keep=3)
    checkpoint.save(manager, 7, state())
    jax.tree.map(np.testing.assert_array_equal, checkpoint.restore(manager, 7, state()), state())


def test_the_newest_two_states_and_the_end_of_stage_1_are_kept(tmp_path):
    manager = checkpoint.manager(tmp_path, keep=3)
    for step in (1, 3, 5, 7, 9):
        checkpoint.save(manager, step, state())
    assert set(manager.all_steps()) == {3, 7, 9}
    assert checkpoint.restore_end_of_stage1(tmp_path, 3, state())["step"] == 7


def test_another_run_without_that_end_of_stage_1_is_refused(tmp_path):
    checkpoint.save(checkpoint.manager(tmp_path, keep=3), 3, state())
    with pytest.raises(FileNotFoundError, match=r"no state of step 4.*it has \[3\]"):
        checkpoint.restore_end_of_stage1(tmp_path, 4, state())


def test_a_state_of_another_network_is_refused(tmp_path):
    manager = checkpoint.manager(tmp_path, keep=3)
    checkpoint.save(manager, 7, state())
    with pytest.raises(ValueError, match="does not hold a state of this configuration"):
        checkpoint.restore(manager, 7, state(width=5))


def test_a_state_cut_off_is_named_with_what_to_do(tmp_path):
    manager = checkpoint.manager(tmp_path, keep=3)
    checkpoint.save(manager, 7, state(width=2000))
    largest = max((tmp_path / "7").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"{tmp_path}/7 .*damaged: delete it to go on from the one before"):
        checkpoint.restore(manager, 7, state(width=2000))


def test_a_model_comes_back_with_its_info_and_replaces_the_one_before(tmp_path):
    for value in (1, 2):
        checkpoint.save_model(tmp_path / "model", {"params": {"w": np.full(3, value)}}, {"arch": value})
    variables, info = checkpoint.load_model(tmp_path / "model")
    np.testing.assert_array_equal(variables["params"]["w"], [2, 2, 2])
    assert info == {"arch": 2} and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoint.save_model(tmp_path / "model", {"w": np.zeros(3)}, {"epochs": np.zeros(1)})
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_model_is_named_in_the_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no model"):
        checkpoint.load_model(tmp_path)


@pytest.mark.parametrize("damage", ["absent", "cut off", "no list of what is there", "a bit"])
def test_half_a_copy_of_a_model_is_named_in_the_error(tmp_path, damage):
    folder = tmp_path / "model"
    checkpoint.save_model(folder, {"params": {"w": np.arange(3000.0)}}, {})
    if damage == "absent":
        shutil.rmtree(folder / "variables")
    elif damage == "cut off":
        for file in (folder / "variables").rglob("d/*"):
            file.write_bytes(file.read_bytes()[:10])
    elif damage == "a bit":
        file = max((folder / "variables").rglob("d/*"), key=lambda path: path.stat().st_size)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        (folder / "variables" / "_METADATA").unlink()
    with pytest.raises(ValueError, match=f"{folder}/variables: the weights are incomplete or damaged"):
        checkpoint.load_model(folder)
    (folder / "model.json").write_text("{")
    with pytest.raises(ValueError, match="model.json: damaged"):
        checkpoint.load_model(folder)


def test_the_info_of_a_model_is_plain_json(tmp_path):
    checkpoint.save_model(tmp_path / "model", {"w": np.zeros(1)}, {"classes": ["wall"]})
    assert json.loads((tmp_path / "model" / "model.json").read_text())["classes"] == ["wall"]
