"""The check of fbgemm's build for CUDA names operators without a kernel and builds that cannot be loaded."""

import json
import subprocess
import zipfile

import pytest

from mim_torchrec.benchmarks.rehearsal import cuda_wheel
from mim_torchrec.errors import SetupError


def test_operators_without_a_kernel_for_gpus_are_named():
    composite, own = "aten::linear", "mim_torchrec::none_of_this_name"
    assert cuda_wheel.without_kernel([composite, own]) == [own]


def test_the_operators_are_those_of_a_rehearsal(tmp_path):
    report = tmp_path / "report.json"
    with pytest.raises(SetupError, match="run make rehearsal first"):
        cuda_wheel.operators_of(report)
    report.write_text(json.dumps({"fbgemm": []}))
    with pytest.raises(SetupError, match="no operators of fbgemm"):
        cuda_wheel.operators_of(report)
    report.write_text(json.dumps({"fbgemm": ["fbgemm::a"]}))
    assert cuda_wheel.operators_of(report) == ["fbgemm::a"]


def test_the_driver_is_stood_in_for_with_the_names_that_a_build_asks_for(tmp_path):
    build = tmp_path / "build" / "fbgemm_gpu"
    build.mkdir(parents=True)
    build.joinpath("fbgemm_gpu_py.so").write_bytes(b"\x00nvmlInit_v2\x00cudaMalloc\x00nvmlDeviceGetName\x00")
    library = cuda_wheel.stand_in_for_driver(tmp_path / "build", tmp_path) / cuda_wheel.DRIVER
    names = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True).stdout
    assert {line.split()[-1] for line in names.splitlines()} >= {"nvmlInit_v2", "nvmlDeviceGetName"}


def test_a_build_that_cannot_be_loaded_is_named(tmp_path):
    wheel = tmp_path / "fbgemm_gpu.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("fbgemm_gpu/__init__.py", "raise ImportError('libnone.so is missing')")
        file.writestr("fbgemm_gpu/fbgemm_gpu_py.so", b"")
    with pytest.raises(SetupError, match="libnone.so is missing"):
        cuda_wheel.without_kernel(["fbgemm::a"], wheel)
