"""Which implementation runs."""

import pytest

from pallas_kernels import KernelError, dispatch


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.delenv("QJAX_DISABLE_KERNELS", raising=False)
    monkeypatch.setattr(dispatch, "backend", lambda: "gpu")


def pick(implementation=None, **obstacles):
    return dispatch.choose("op", implementation, {name: lambda text=text: text for name, text in obstacles.items()})


def test_the_first_that_can_run_is_chosen(on_gpu):
    assert pick(pallas_tpu=None, pallas_gpu=None) == "pallas_gpu"
    assert pick(pallas_tpu=None) == "xla"
    assert pick(pallas_gpu="a shape") == "xla"
    assert pick("xla", pallas_gpu=None) == "xla"


def test_a_named_one_raises_with_its_reason(on_gpu):
    assert pick("pallas_gpu", pallas_gpu=None) == "pallas_gpu"
    with pytest.raises(KernelError, match="op: pallas_gpu cannot run: a shape"):
        pick("pallas_gpu", pallas_gpu="a shape")
    with pytest.raises(KernelError, match="runs on tpu and the backend is gpu"):
        pick("pallas_tpu", pallas_gpu=None, pallas_tpu=None)
    with pytest.raises(KernelError, match="no implementation 'cuda'; there are pallas_gpu, xla"):
        pick("cuda", pallas_gpu=None)


def test_the_environment_turns_kernels_off(on_gpu, monkeypatch):
    monkeypatch.setenv("QJAX_DISABLE_KERNELS", "1")
    assert pick(pallas_gpu=None) == pick("pallas_gpu", pallas_gpu=None) == "xla"
    monkeypatch.setenv("QJAX_DISABLE_KERNELS", "0")
    assert pick(pallas_gpu=None) == "pallas_gpu"
