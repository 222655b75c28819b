"""AMX's tile registers: given back by every kernel that claims them.

What a thread leaves in them is saved, 8 KiB, at each switch to another one, and is in the way of
whoever configures tiles in another shape without asking.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pyllm._native import cpu_extension
from pyllm.generate.native import native_model
from pyllm.models import ModelConfig, Transformer, quantize_model
from pyllm.ops import int8_linear, linear_cross_entropy, moe_ffn

EXTENSION = cpu_extension()
if EXTENSION is None or "amx" not in EXTENSION.supported_isas():
    pytest.skip("no AMX here", allow_module_level=True)

PROBE = r"""
extern "C" int configured() {  // is a byte of what describes the tiles not 0?
  unsigned char shapes[64];
  asm volatile("sttilecfg %0" : "=m"(shapes));
  int all = 0;
  for (int i = 0; i < 64; ++i) all |= shapes[i];
  return all;
}
extern "C" void configure() {
  unsigned char shapes[64] = {1};
  shapes[16] = 8, shapes[48] = 2;  // a tile of 2 rows of 8 bytes
  asm volatile("ldtilecfg %0" : : "m"(shapes));
}
extern "C" void release() { asm volatile("tilerelease"); }
"""


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("c++ is not on PATH")
    folder: Path = tmp_path_factory.mktemp("probe")
    (folder / "probe.cpp").write_text(PROBE, encoding="utf-8")
    command = [compiler, "-O1", "-shared", "-fPIC", "-mamx-tile", "probe.cpp", "-o", "probe.so"]
    subprocess.run(command, check=True, cwd=folder)
    return ctypes.CDLL(str(folder / "probe.so"))


def _experts() -> torch.Tensor:
    x, w_in, w_out = torch.ones(20, 8), torch.ones(3, 12, 8), torch.ones(3, 8, 6)
    given = [one.bfloat16().requires_grad_() for one in (x, w_in, w_out)]
    y = moe_ffn(*given, torch.ones(20, 1), torch.arange(20).view(20, 1) % 3, "swiglu")
    return torch.cat([one.flatten() for one in (y, *torch.autograd.grad(y.sum(), given))])


def _words() -> torch.Tensor:
    given = [torch.ones(n, 8).bfloat16().requires_grad_() for n in (20, 40)]
    loss = linear_cross_entropy(*given, torch.arange(20))
    return torch.cat([one.flatten() for one in (loss, *torch.autograd.grad(loss, given))])


def _int8() -> torch.Tensor:
    return int8_linear(torch.ones(20, 8), torch.ones(40, 8, dtype=torch.int8), torch.ones(40))


@torch.inference_mode()
def _step() -> torch.Tensor:
    torch.manual_seed(0)
    model = quantize_model(Transformer(ModelConfig(37, 40, 1, 16, 2, 2, 8)).eval())
    native = native_model(model)
    assert native is not None
    return native.next_logits(torch.arange(20).view(1, 20), model.new_cache(1))


@pytest.mark.parametrize("kernel", [_experts, _words, _int8, _step])
def test_tiles_are_given_back(
    kernel: Callable[[], torch.Tensor], probe: ctypes.CDLL, set_threads: Callable[[int], None]
) -> None:
    """By a thread as it comes, and by one in which somebody left tiles of another shape."""
    set_threads(1)  # or another one might do it all
    previous = EXTENSION.active_isa()
    try:
        EXTENSION.set_isa("avx512")
        expected = kernel()
        EXTENSION.set_isa("amx")
        for before in (probe.release, probe.configure):
            before()
            torch.testing.assert_close(kernel(), expected, rtol=0.01, atol=0.01)
            assert probe.configured() == 0
    finally:
        probe.release()
        EXTENSION.set_isa(previous)
