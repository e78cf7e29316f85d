"""Where a delta changed a model: layers x modules, and the picture of it."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib", reason="the pictures need the extra 'finetune'")

from PIL import Image

from sparse_optim.analysis.change_map import change_maps, place_of, total
from sparse_optim.analysis.change_plot import draw_changes
from sparse_optim.delta import Change, DeltaError


def each(*names: str) -> dict[str, Change]:
    """Names with 1, 2, ... of 100 entries changed."""
    return {name: Change(at, 100) for at, name in enumerate(names, 1)}


def test_encoder_and_decoder_have_a_map_each():
    names = [
        f"{stack}.block.{layer}.layer.{part}.weight"
        for stack, parts in (
            ("encoder", ("0.SelfAttention.q", "1.DenseReluDense.wi")),
            ("decoder", ("0.SelfAttention.q", "1.EncDecAttention.q", "2.DenseReluDense.wi")),
        )
        for layer in range(3)
        for part in parts
    ]
    maps, others = change_maps(each("shared.weight", *names))
    assert [one.stack for one in maps] == ["encoder.block", "decoder.block"]
    assert maps[1].layers == ((0,), (1,), (2,))
    assert maps[1].modules == (
        "layer.0.SelfAttention.q", "layer.1.EncDecAttention.q", "layer.2.DenseReluDense.wi",
    )  # fmt: skip
    assert others == {"shared.weight": Change(1, 100)}
    assert maps[0].total + maps[1].total + others["shared.weight"] == total(
        each("shared.weight", *names).values()
    )


def test_modules_keep_their_order_where_layers_lack_some():
    maps, others = change_maps(each("h.0.k", "h.0.o", "h.1.q", "h.1.k", "h.2.v", "h.2.o", "h.2.x"))
    assert maps[0].modules == ("q", "k", "v", "o", "x")
    assert not others
    assert maps[0].cells[(0,), "k"] == Change(1, 100)
    assert ((0,), "q") not in maps[0].cells


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("vit.encoder.layer.11.attention.attention.query.bias",
         ("vit.encoder.layer", (11,), "attention.attention.query")),
        ("vit.embeddings.cls_token", ("", (), "vit.embeddings.cls_token")),
        ("model.layers.3.block_sparse_moe.experts.7.w2.weight",
         ("model.layers", (3,), "block_sparse_moe.experts.*.w2")),
        ("encoder.block.1.layer.1.mlp.experts.expert_12.wi.weight",
         ("encoder.block", (1,), "layer.1.mlp.experts.expert_*.wi")),
        ("base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.default.weight",
         ("base_model.model.bert.encoder.layer", (0,), "attention.self.query.lora_A.default")),
        ("swin.encoder.layers.2.blocks.5.mlp.fc1.bias",
         ("swin.encoder.layers", (2, 5), "mlp.fc1")),
        ("0.weight", ("", (0,), "weight")),
    ],
)  # fmt: skip
def test_places(name, place):
    assert place_of(name) == place


def test_experts_share_a_cell_and_one_layer_is_no_stack():
    experts = [f"layers.{at}.experts.{e}.w1.weight" for at in range(2) for e in range(3)]
    maps, others = change_maps(each(*experts, "head.0.weight"))
    assert maps[0].cells == {((0,), "experts.*.w1"): Change(6, 300),
                             ((1,), "experts.*.w1"): Change(15, 300)}  # fmt: skip
    assert list(others) == ["head.0.weight"]


@pytest.mark.parametrize("layers", [2, 12, 48])
def test_the_picture_has_a_colour_for_each_share(tmp_path, layers):
    changes = {f"h.{at}.fc": Change(at, 100) for at in range(layers)}
    path = tmp_path / "map.png"
    draw_changes(changes, "title", path)
    with Image.open(path) as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert (0xEC, 0xEE, 0xF0) in colours  # layer 0: nothing changed
    draw_changes(changes | each("embed", "head"), "title", tmp_path / "others.png")
    with Image.open(path) as picture, Image.open(tmp_path / "others.png") as taller:
        assert taller.height > picture.height


def test_the_picture_of_sizes_without_a_base_value(tmp_path):
    changes = {"h.0.fc": Change(2, 4, (1.0, 4.0)), "h.1.fc": Change(2, 4, (1.0, 0.0)),
               "head": Change(4, 4)}  # fmt: skip
    draw_changes(changes, "title", tmp_path / "map.svg", size=True)
    text = (tmp_path / "map.svg").read_text()
    assert "size of the change" in text
    with pytest.raises(DeltaError, match="nothing to draw"):
        draw_changes({"head": Change(4, 4)}, "title", tmp_path / "x.png", size=True)
    with pytest.raises(DeltaError, match="no entry changed"):
        draw_changes({"h.0.fc": Change(0, 4)}, "title", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
