"""The table of block sizes: how it is read, measured and written; the clock is a fake."""

import functools
import types

import jax
import pytest
from test_pallas_triton import network_kernels

from kernels.sparse_conv import bench, pallas_triton, tuning
from kernels.sparse_conv.target import INTERPRET, targeting
from kernels.sparse_conv.tuning import Blocks, Entry, Key


def test_a_missing_entry_takes_the_nearest(monkeypatch):
    def key(channels_in, channels_out, dtype, arch, kernel="conv"):
        return Key(kernel, channels_in, channels_out, 3, dtype, arch)

    table = {
        key(32, 32, "bfloat16", "sm_80"): Blocks(64, 32, 32, 4, 5),
        key(256, 256, "bfloat16", "sm_80"): Blocks(64, 32, 128, 8, 5),
        key(256, 256, "bfloat16", "sm_90"): Blocks(128, 64, 256, 8, 5),
        key(32, 32, "float32", "sm_80"): Blocks(32, 16, 32, 4, 3),
        key(32, 32, "bfloat16", "sm_80", "weight_gradient"): Blocks(64, 32, 32, 8, 5),
    }
    monkeypatch.setattr(tuning, "_table", lambda: {k: Entry(blocks) for k, blocks in table.items()})
    nearest = {
        key(48, 32, "bfloat16", "sm_80"): key(32, 32, "bfloat16", "sm_80"),
        key(96, 128, "float16", "sm_86"): key(256, 256, "bfloat16", "sm_80"),
        key(3, 32, "bfloat16", "sm_120"): key(256, 256, "bfloat16", "sm_90"),
        key(256, 256, "float32", "sm_90"): key(32, 32, "float32", "sm_80"),
        key(256, 256, "float32", "sm_90", "weight_gradient"): key(32, 32, "bfloat16", "sm_80", "weight_gradient"),
    }
    assert {asked: tuning.lookup(asked) for asked in nearest} == {asked: table[k] for asked, k in nearest.items()}


def test_candidates_are_distinct_fit_the_registers_and_can_be_tried():
    for kernel in ("conv", "weight_gradient"):
        for channels in ((3, 32), (96, 96), (256, 256)):
            key = Key(kernel, *channels, 3, "bfloat16", "sm_80")
            found = tuning.candidates(key)
            assert len(set(found)) == len(found) > 1
            before = tuning.lookup(key)
            with tuning.trying(kernel, found[0]):
                assert tuning.lookup(key) == found[0]
            assert tuning.lookup(key) == before


def test_a_saved_table_is_read_back(tmp_path):
    key = Key("conv", 7, 13, 3, "float16", "sm_120")
    table = tuning.load() | {key: Entry(Blocks(64, 16, 16, 4, 3), 12.5, "a GPU, jax 1.0")}
    tuning.save(table, tmp_path / "tuning.json")
    assert tuning.load(tmp_path / "tuning.json") == table
    tuning.save(tuning.load(), tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == tuning.TABLE.read_text(), "the committed table is as save writes it"


def test_every_convolution_of_the_network_is_tuned_and_each_kernel_of_it():
    keys = bench.tuning_keys(bench.network_problems(), "bfloat16", "sm_80")
    shapes = {(round(volume ** (1 / 3)), *channels) for volume, *channels in network_kernels()}
    asked = {(key.kernel, key.kernel_size, key.in_channels, key.out_channels) for key in keys}
    assert asked == (
        {("conv", *shape) for shape in shapes}
        | {("weight_gradient", *shape) for shape in shapes}
        | {("conv", size, c_out, c_in) for size, c_in, c_out in shapes if c_in != 3}
    )
    for key, problem in keys.items():
        assert (problem.kernel_size, problem.in_channels, problem.out_channels) == (key.kernel_size, *key[1:3])


class FakeTrial:
    """Wider row tiles are faster; those with 3 stages do not compile; says which keys it was asked for."""

    def __init__(self, stops_at: int = 10**9):
        self.keys, self.timed, self.stops_at = [], 0, stops_at

    def __call__(self, key, problem):
        self.keys.append(key)
        return self

    def lower(self, blocks):
        return types.SimpleNamespace(compile=functools.partial(self.compile, blocks))

    def compile(self, blocks):
        if blocks.stages == 3:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: shared memory")
        return blocks

    def seconds(self, blocks):
        self.timed += 1
        if self.timed == self.stops_at:
            raise KeyboardInterrupt
        return 1e-3 / blocks.rows + 1e-9 * blocks.warps


def test_tuning_takes_the_fastest_that_runs_goes_on_where_it_was_stopped_and_keeps_the_rest(tmp_path):
    path = tmp_path / "tuning.json"
    path.write_text(tuning.TABLE.read_text())
    problems = bench.tuning_keys([bench.Problem(100, 3, 32, 64), bench.Problem(100, 2, 32, 32)], "bfloat16", "sm_90")
    first, second, *_ = problems
    stopped = FakeTrial(stops_at=len(tuning.candidates(first)) // 2 + 2)
    with pytest.raises(KeyboardInterrupt):
        bench.tune(problems, "a GPU", stopped, path)
    assert set(tuning.load(path)) - set(tuning.load()) == {first}
    resumed = FakeTrial()
    bench.tune(problems, "a GPU", resumed, path)
    assert stopped.keys == [first, second] and resumed.keys == [key for key in problems if key != first]
    table = tuning.load(path)
    for key in problems:
        rows = max(blocks.rows for blocks in tuning.candidates(key))
        assert table[key].blocks.rows == rows and table[key].blocks.stages == 5 and table[key].blocks.warps == 4
        assert table[key].device == "a GPU" and table[key].microseconds == pytest.approx(1e3 / rows + 4e-3, abs=0.01)
    assert {key: table[key] for key in tuning.load()} == tuning.load()
    assert [file.name for file in tmp_path.iterdir()] == ["tuning.json"]
    again, newer = FakeTrial(), FakeTrial()
    bench.tune(problems, "a GPU", again, path)
    bench.tune(problems, "another GPU", newer, path)
    assert again.keys == [] and newer.keys == list(problems)


def test_tuning_says_which_kernel_no_candidate_of_which_runs(tmp_path):
    class Broken(FakeTrial):
        def compile(self, blocks):
            raise jax.errors.JaxRuntimeError("INTERNAL: ptxas")

    tuning.save(tuning.load(), tmp_path / "tuning.json")
    problems = bench.tuning_keys([bench.Problem(100, 2, 32, 32)], "float32", "sm_90")
    with pytest.raises(RuntimeError, match="no candidate for Key.*'conv'.* runs on a GPU"):
        bench.tune(problems, "a GPU", Broken(), tmp_path / "tuning.json")
    assert tuning.load(tmp_path / "tuning.json") == tuning.load()


@pytest.mark.parametrize("kernel", ["conv", "weight_gradient"])
@pytest.mark.parametrize("problem", [bench.Problem(60, 3, 3, 5), bench.Problem(60, 2, 3, 5, transposed=True)])
def test_a_trial_runs_the_kernel_it_times_with_the_blocks_it_is_given(kernel, problem, monkeypatch):
    called = []
    monkeypatch.setattr(pallas_triton, "_call", noting(pallas_triton._call, called))
    blocks = Blocks(32, 16, 16, 4, 3)
    with targeting(INTERPRET):
        key = Key(kernel, *problem[2:4], problem.kernel_size, "float32", INTERPRET)
        lowered = bench.Trial(key, problem).lower(blocks)
    name = {"conv": "sparse_conv", "weight_gradient": "sparse_conv_weight_gradient"}[kernel]
    assert called.count((name, blocks)) == 1 and len(lowered.out_info) == bench._CALLS


def noting(call, calls: list):
    """`pallas_triton._call`, which appends what it is asked for."""

    def noted(kernel, grid, out, plan, name, *arguments):
        calls.append((name, plan.blocks))
        return call(kernel, grid, out, plan, name, *arguments)

    return noted


def test_tuning_without_a_gpu_says_what_it_needs(monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench", "--tune"])
    with targeting("sm_75"), pytest.raises(SystemExit, match="do not run here: it needs an NVIDIA GPU .* is sm_75"):
        bench.main()
