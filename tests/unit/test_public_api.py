"""What users import: complete, typed, documented, and fast to import."""

import ast
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from PIL import Image

import mim_torchrec
from mim_torchrec.data.errors import DataError
from mim_torchrec.data.images import encode_jpeg
from mim_torchrec.encoders.checkpoint import save_encoder
from tests.unit.test_encoders import TITLES, build

PACKAGES = ["mim_torchrec", "mim_torchrec.ciubm", "mim_torchrec.embeddings"]
IMAGES = [Image.new("RGB", (40, 20), color) for color in ("red", "blue", "green")]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_there_and_documented(package):
    module = import_module(package)
    for name in module.__all__:
        assert getattr(module, name).__doc__, name
    assert sorted(module.__all__) == dir(module)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_type_checker_sees_the_same_names_as_the_interpreter(package):
    module = import_module(package)
    tree = ast.parse(Path(module.__file__).read_text())
    (block,) = (node.body for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block if isinstance(node, ast.ImportFrom)]
    declared = {alias.name: node.module for node in imports for alias in node.names}
    assert declared == {name: where for name, where in module._NAMES.items() if name != "__version__"}


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'mim_torchrec' has no attribute 'load_encoders'"):
        mim_torchrec.load_encoders  # noqa: B018


def test_importing_the_package_imports_no_library():
    script = "import json, sys, mim_torchrec; print(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert {"torch", "numpy", "pyarrow", "tyro"}.isdisjoint(json.loads(result.stdout))


def test_the_package_is_marked_as_typed():
    assert (Path(mim_torchrec.__file__).parent / "py.typed").is_file()


def test_five_lines_encode_items_as_the_table_has_them(tmp_path: Path):
    encoder = build()
    save_encoder(encoder, tmp_path / "encoder")
    loaded = mim_torchrec.load_encoder(tmp_path / "encoder")
    pixels = torch.stack([encoder.vision.transform(image) for image in IMAGES])
    with torch.no_grad():
        expected = encoder.encode_table(pixels, encoder.text.tokenize(TITLES))
    for batch_size in (1, 2, 64):
        found = mim_torchrec.encode(loaded, IMAGES, TITLES, batch_size=batch_size)
        torch.testing.assert_close(found, expected)


def test_images_may_be_bytes_or_files(tmp_path: Path):
    encoder = build()
    data = [encode_jpeg(image) for image in IMAGES]
    file = tmp_path / "blue.jpg"
    file.write_bytes(data[1])
    found = mim_torchrec.encode(encoder, [data[0], file, str(file)], TITLES)
    expected = mim_torchrec.encode(encoder, [data[0], data[1], data[1]], TITLES)
    torch.testing.assert_close(found, expected)


def test_no_items_are_no_vectors():
    assert mim_torchrec.encode(build(), [], []).shape == (0, 6)


def test_what_cannot_be_encoded_is_named():
    encoder = build()
    with pytest.raises(DataError, match="image 1: the image of 3 bytes cannot be decoded"):
        mim_torchrec.encode(encoder, [IMAGES[0], b"abc", IMAGES[1]], TITLES)
    with pytest.raises(ValueError, match="3 images, but 2 titles"):
        mim_torchrec.encode(encoder, IMAGES, TITLES[:2])
    with pytest.raises(ValueError, match="batch_size is 0"):
        mim_torchrec.encode(encoder, IMAGES, TITLES, batch_size=0)
    with pytest.raises(RuntimeError, match="training mode"):
        mim_torchrec.encode(encoder.train(), IMAGES, TITLES)
