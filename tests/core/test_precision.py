"""Which products of float32 matrices are exact: told of torch's own setting, which a GPU alone heeds."""

import sys
import threading

import pytest
import torch

from fourmill.core.precision import exact_products, fast_products


def test_a_block_has_its_precision_and_gives_back_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    kind = torch.get_float32_matmul_precision
    assert kind() == "highest"
    with fast_products():
        assert kind() == "high"
        with exact_products():
            assert kind() == "highest"
        assert kind() == "high"
    with fast_products(False):
        assert kind() == "highest"
    with pytest.raises(RuntimeError, match="on the way"), fast_products():
        raise RuntimeError("on the way")
    assert kind() == "highest"


def test_without_a_gpu_nothing_is_set() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with fast_products():
        assert torch.get_float32_matmul_precision() == "highest"


def test_threads_do_not_change_each_others_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    every = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads meet amid everything
    seen: list[set[str]] = [set(), set()]

    def work(number: int) -> None:
        for _ in range(3000):
            with (fast_products, exact_products)[number]():
                for _ in range(5):
                    seen[number].add(torch.get_float32_matmul_precision())

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(every)
    assert seen == [{"high"}, {"highest"}]
    assert torch.get_float32_matmul_precision() == "highest"
