"""Each Triton form against its torch reference: interpreted on the CPU, and compiled with --gpu. And who is chosen when."""

import importlib
import os

import pytest
import torch
from artifact_guard.kernels import dispatch, kv_scale, regions, renoise, robust_threshold, score_dynamics

from tests.unit.test_kernels import MASKS, normal

pytest.importorskip("triton", reason="Triton is not installed")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((1, 1, 1, 1), (2, 4, 17, 30), (3, 1, 5, 257), (1, 16, 64, 64))


pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
"""NaN and infinity are meant; the interpreter computes with numpy, which warns of them."""


@pytest.fixture(params=["interpreted", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch):
    """Where the Triton forms run, all of them chosen."""
    if request.param == "interpreted" and not dispatch.interpreting():
        pytest.skip("with --gpu the Triton forms are compiled")
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    return torch.device("cpu" if request.param == "interpreted" else "cuda")


def kernel(name, device):
    """(reference, function that must take its Triton form), both on CPU tensors as callers see them."""
    function = dispatch.KERNELS[name]

    def on_device(*arguments, **keywords):
        arguments = [x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments]
        keywords = {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in keywords.items()}
        given = [*arguments, *keywords.values()]
        assert dispatch.choose(name, given, function.dtypes).backend == "triton"
        result = function(*arguments, **keywords)
        return tuple(x.cpu() for x in result) if isinstance(result, tuple) else result.cpu()

    return function.reference, on_device


def assert_close(result, wanted, ulps=4, **tolerance):
    """Same shape and dtype, NaN in the same places, and equal to a few rounding errors of the dtype."""
    assert result.shape == wanted.shape and result.dtype == wanted.dtype
    if not tolerance:
        precision = torch.finfo(wanted.dtype).eps
        tolerance = {"rtol": ulps * precision, "atol": ulps * precision}
    torch.testing.assert_close(result, wanted, equal_nan=True, **tolerance)


def pair(shape, dtype=torch.float32):
    return normal(*shape, seed=1, dtype=dtype), normal(*shape, seed=2, dtype=dtype)


def spoilt(x):
    """x with a NaN and an infinity in its first sample, in memory that is not contiguous."""
    x = x.clone().transpose(-1, -2).contiguous().transpose(-1, -2)
    x[0, 0, 0, 0], x[0, -1, -1, -1] = torch.nan, torch.inf
    return x


# Score dynamics


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_change_maps(shape, dtype, device):
    reference, triton = kernel("change_maps", device)
    now, before = pair(shape, dtype)
    for given in ((now, before), (spoilt(now), before)):
        (mean, largest), (wanted_mean, wanted_largest) = triton(*given), reference(*given)
        assert_close(mean, wanted_mean)
        assert torch.equal(largest.nan_to_num(7e7), wanted_largest.nan_to_num(7e7))


@pytest.mark.parametrize("shape", SHAPES)
def test_bend_map(shape, device):
    reference, triton = kernel("bend_map", device)
    velocity, (before, after) = normal(*shape), pair(shape)
    for given in ((velocity, before, after), (spoilt(velocity), before, after), (velocity, before, before), (before, velocity, spoilt(after))):
        assert_close(triton(*given), reference(*given))


@pytest.mark.parametrize("sigma", [0.0, 0.6, 1.0, 2.3, 9.0])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 2, 9, 18), (1, 1, 5, 257)])
def test_change_speed(shape, sigma, device):
    """Images smaller than the blur's reach included; a NaN spreads as far as in the reference."""
    reference, triton = kernel("change_speed", device)
    now, before = pair(shape)
    assert_close(triton(now, before, sigma), reference(now, before, sigma), ulps=16)
    now[0, 0, 0, 0] = torch.nan
    assert_close(triton(now, before, sigma), reference(now, before, sigma), ulps=16)
    half = [x.to(torch.float16) for x in pair(shape)]
    assert_close(triton(*half, sigma), reference(*half, sigma), ulps=16)


# Robust thresholds


ROWS = {
    "one": torch.tensor([[3.0]]), "two": torch.tensor([[3.0, -1.0]]), "odd": normal(3, 4099), "even": normal(2, 4, 16, 20),
    "equal": torch.ones(2, 100), "zeros": torch.tensor([[0.0, -0.0, 0.0, -0.0, 1e-45, -1e-45]]),
    "ties": normal(2, 5000).mul(3).round(), "huge": normal(2, 77) * 1e38, "tiny": normal(2, 78) * 1e-40,
    "infinite": torch.tensor([[1.0, torch.inf, -torch.inf, 2.0, 3.0]]),
    "not a number": torch.tensor([[1.0, torch.nan, 2.0, 0.5], [torch.nan] * 4, [4.0, 3.0, 2.0, -torch.nan]]),
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ROWS)
def test_median_and_mad(name, masked, device):
    """Exactly the reference's, as no value is made on the way but by subtraction and the mean of two."""
    reference, triton = kernel("median_and_mad", device)
    values = ROWS[name]
    valid = (torch.rand(values.shape, generator=torch.Generator().manual_seed(3)) < 0.6,) if masked else ()
    for result, wanted in zip(triton(values, *valid), reference(values, *valid)):
        assert_close(result, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.5, 0.85, 1.0])
@pytest.mark.parametrize("name", ROWS)
def test_sample_quantile(name, share, device):
    reference, triton = kernel("sample_quantile", device)
    values = ROWS[name]
    assert_close(triton(values, share), reference(values, share), rtol=0, atol=0)
    valid = torch.rand(values.shape[1:], generator=torch.Generator().manual_seed(4)) < 0.5
    assert_close(triton(values, share, valid[None]), reference(values, share, valid[None]), rtol=0, atol=0)


@pytest.mark.parametrize("share", [0.7, 0.3, 0.85, 0.1 + 0.2])
def test_quantiles_of_all_counts_are_of_one_rank(share, device, monkeypatch):
    """numpy's, torch's and Triton's, of as many values as give int(share * (n - 1)) another rank than whole numbers do."""
    reference, triton = kernel("sample_quantile", device)
    odd = [n for n in range(2, 4000) if int(share * (n - 1)) != (n - 1) * round(share * 1e6) // 10**6] or [11, 3999]
    values = torch.arange(4000.0).expand(len(odd[:40]), -1)
    valid = torch.arange(4000) < torch.tensor(odd[:40])[:, None]
    wanted = reference(values, share, valid)
    assert torch.equal(triton(values, share, valid), wanted)
    monkeypatch.setattr(robust_threshold, "NUMPY_DEVICES", ())
    assert torch.equal(reference(values, share, valid), wanted)


# Regions, renoising, keys and values


@pytest.mark.parametrize("name", MASKS)
def test_label_regions(name, device):
    reference, triton = kernel("label_regions", device)
    assert torch.equal(triton(MASKS[name]), reference(MASKS[name]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_renoise(shape, dtype, device):
    """Outside the mask every bit is as it was, NaN included; inside, what is outside does not matter."""
    reference, triton = kernel("renoise", device)
    x, (x0, eps) = normal(*shape, dtype=dtype), pair(shape)
    mask = torch.rand(shape[0], *shape[2:], generator=torch.Generator().manual_seed(6)) < 0.5
    x[~mask[:, None].expand_as(x)] = torch.nan
    result = triton(x, x0, eps, mask, 0.3, 0.9)
    assert_close(result, reference(x, x0, eps, mask, 0.3, 0.9))
    for all_or_nothing in (torch.ones_like(mask), torch.zeros_like(mask)):
        assert_close(triton(x, spoilt(x0), eps, all_or_nothing, 0.3, 0.9), reference(x, spoilt(x0), eps, all_or_nothing, 0.3, 0.9))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape,axis,first,count", [
    ((2, 9, 8), 1, 0, 9), ((2, 9, 8), 1, 4, 5), ((3, 2, 70, 24), 2, 7, 50), ((1, 5, 33, 7), 2, 0, 1),
])
def test_scale_pair(shape, axis, first, count, dtype, device):
    """Tokens outside keep every bit; those inside are rounded once, as torch's addcmul does."""
    reference, triton = kernel("scale_pair", device)
    key, value = pair(shape, dtype)
    amount = torch.rand(shape[0], count, generator=torch.Generator().manual_seed(8)) * 0.1
    for given in ((key, value), (spoilt(key) if key.ndim == 4 else key, value)):
        for result, wanted in zip(triton(*given, amount, first, axis), reference(*given, amount, first, axis)):
            assert_close(result, wanted, ulps=1)
            outside = [i for i in range(shape[axis]) if not first <= i < first + count]
            assert torch.equal(result.index_select(axis, torch.tensor(outside, dtype=torch.int64)).nan_to_num(7.0),
                               wanted.index_select(axis, torch.tensor(outside, dtype=torch.int64)).nan_to_num(7.0))
    with pytest.raises(ValueError, match="does not fit"):
        triton(key, value, amount, shape[axis], axis)


# The choice


LARGEST = {
    "Wan, 81 frames of 1280x720": (1, 21, 3600, 5120), "HunyuanVideo, 129 frames of 720p": (2, 33, 3600, 3072),
    "Flux, 2560x2560": (8, 1, 25600, 3072),
}
"""Samples, frames, tokens of a frame and channels of keys."""


def test_launches_are_within_what_a_gpu_takes(monkeypatch):
    """2^31 - 1 programs on a grid's first axis and 65,535 on its others, of keys of videos and of the largest latents."""
    grids = []

    class Launch:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *arguments, **keywords: None

    def launched(name, *arguments):
        module = importlib.import_module(f"{dispatch.KERNELS[name].__module__}_triton")
        for own in [key for key, value in vars(module).items() if hasattr(value, "arg_names")]:
            monkeypatch.setattr(module, own, Launch())
        getattr(module, name)(*arguments)

    for batch, frames, tokens, channels in LARGEST.values():
        key = torch.empty(batch, frames * tokens, channels, dtype=torch.bfloat16, device="meta")
        assert kv_scale.too_large([key]) is None
        launched("scale_pair", key, key, torch.empty(batch, frames * tokens, device="meta"))
    latent = torch.empty(8 * 21, 16, 256, 256, device="meta")
    pixels = torch.empty(8, 3, 4096, 4096, device="meta")
    for x in (latent, pixels):
        plane = x[:, 0]
        launched("change_maps", x, x)
        launched("bend_map", x, x, x)
        launched("change_speed", x, x, 2.0)
        launched("renoise", x, x, x, plane > 0, 1.0, 1.0)
        launched("label_regions", plane > 0)
    assert len(grids) == 3 + 2 * (1 + 1 + 2 + 1 + 2)
    for first, *others in grids:
        assert 0 < first < 2**31 and all(0 < other < 2**16 for other in others), grids
    assert "counts up to" in kv_scale.too_large([torch.empty(1, 2**21, 1024, device="meta")])


def test_every_kernel_has_a_triton_form_of_the_same_signature():
    """By name, so that none of these tests is forgotten when a kernel is added."""
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert set(dispatch.KERNELS) <= tested
    for module in (kv_scale, regions, renoise, robust_threshold, score_dynamics):
        for name, function in vars(module).items():
            if getattr(function, "reference", None) is not None:
                assert dispatch.KERNELS[name] is function


def test_reason_for_the_choice(monkeypatch):
    """Nothing measured, nothing chosen; what was measured is chosen from its size on; a word against it is heeded."""
    x = torch.zeros(2, 3)
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    assert dispatch.choose("change_maps", [x]) == ("torch", "Triton has no backend for the device cpu")
    monkeypatch.setattr(dispatch, "obstacle", lambda *_: None)
    monkeypatch.delitem(dispatch.FASTER, "change_maps", raising=False)
    assert "not measured" in dispatch.choose("change_maps", [x]).reason
    monkeypatch.setitem(dispatch.FASTER, "change_maps", 6)
    assert dispatch.choose("change_maps", [x]).backend == "triton"
    assert "from 6 elements" in dispatch.choose("change_maps", [x[:1]]).reason
    monkeypatch.setitem(dispatch.FASTER, "sample_quantile", 4)
    choices = [robust_threshold.sample_quantile, torch.zeros(50, 3)], [robust_threshold.sample_quantile, torch.zeros(1, 4)]
    told = [dispatch.choose("sample_quantile", [rows], size_of=function.size_of).backend for function, rows in choices]
    assert told == ["torch", "triton"]  # by the length of a row, however many there are
    monkeypatch.setenv(dispatch.VARIABLE, "torch")
    assert dispatch.choose("change_maps", [x]) == ("torch", f"{dispatch.VARIABLE}=torch")


def test_what_cannot_run_by_triton_is_said(monkeypatch):
    """Asked for by name, it is an error that names the reason; empty tensors are nobody's error."""
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="change_maps cannot run by Triton: Triton has no backend for the device cpu"):
        score_dynamics.change_maps(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="no Triton form for torch.float64"):
        score_dynamics.change_maps(*[torch.zeros(1, 1, 2, 2, dtype=torch.float64)] * 2)
    trained = torch.zeros(1, 4, 2, requires_grad=True)
    with pytest.raises(ValueError, match="no gradient"):
        kv_scale.scale_pair(trained, trained, torch.zeros(1, 4))
    assert regions.label_regions(torch.zeros(0, 4, 4) > 0).shape == (0, 4, 4)
    monkeypatch.setenv(dispatch.VARIABLE, "fast")
    with pytest.raises(ValueError, match="auto, torch or triton"):
        regions.label_regions(torch.zeros(1, 4, 4) > 0)


def test_rows_that_do_not_fit_into_one_program_are_torchs(monkeypatch):
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="takes up to 65536 values a sample, and here are 65537"):
        robust_threshold.sample_quantile(torch.zeros(1, robust_threshold.LONGEST_ROW + 1), 0.5)


def test_what_is_chosen_by_itself_has_a_triton_form():
    assert set(dispatch.FASTER) <= set(dispatch.KERNELS)


class NoCompiler(RuntimeError):
    pass


def test_a_gpu_on_which_triton_does_not_work_is_torchs(monkeypatch):
    """Too old, another make, or a kernel that cannot be built there: the smallest one is tried first, once."""
    asked, device = [], torch.device("cpu")  # stands in for a GPU

    def form(*arguments):
        asked.append(arguments)
        raise NoCompiler("Failed to find C compiler.\nPlease specify via CC")

    told = dispatch.broken_on.__wrapped__
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(dispatch, "on_device", lambda *_: form)
    assert told(device) == "Triton does not work here (NoCompiler: Failed to find C compiler.)" and len(asked) == 1
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    assert told(device) == "the Triton forms need compute capability 7.0 or newer" and len(asked) == 1
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "NVIDIA" in told(device) and len(asked) == 1
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    monkeypatch.setattr(dispatch, "on_device", lambda *_: lambda *_: None)
    assert told(device) is None


def test_interpreter_is_never_chosen_by_itself(monkeypatch):
    """TRITON_INTERPRET, set for something else, must not slow every run down."""
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "1")
    monkeypatch.setitem(dispatch.FASTER, "change_maps", 0)
    assert dispatch.choose("change_maps", [torch.zeros(2)]).backend == "torch"
