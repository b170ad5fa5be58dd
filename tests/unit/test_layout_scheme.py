"""A layout in a line: what may be written, what it means for a model, and how it is kept as data."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.errors import Corrupt, FormatError
from checkpoint.format.flat import share_of
from checkpoint.format.json_fields import dump_json, parse_json
from checkpoint.format.layout import (
    AXES,
    FlatGroup,
    Layout,
    Mesh,
    Only,
    Partial,
    Replicate,
    SectionShard,
    Shard,
    StridedShard,
)
from checkpoint.format.notation import layout_from_json, layout_to_json
from checkpoint.format.scheme import Role, Scheme, arrange, format_layout, parse_layout
from checkpoint.format.stages import ExpertMap, StageMap, deal_layers
from tests.layout_samples import meshes, placements, slices


@given(
    st.lists(st.tuples(st.sampled_from(AXES), st.integers(1, 9)), min_size=1, unique_by=lambda axis: axis[0]),
    st.integers(0, 3),
    st.integers(1, 8),
)
def test_what_is_written_is_read_back(axes, zero, align):
    zero = zero if "replica" in dict(axes) else 0
    scheme = Scheme(Mesh(tuple(axes)), zero, align)
    assert parse_layout(format_layout(scheme)) == scheme


def test_axes_may_be_spaced_and_the_last_one_varies_fastest():
    scheme = parse_layout(" replica = 2, tensor=4 ")
    assert scheme == Scheme(Mesh((("replica", 2), ("tensor", 4))))
    assert scheme.mesh.coordinates(5) == (1, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not an axis and a number: write it like"),
        ("replica", "'replica' in the layout"),
        ("replica=2,,tensor=2", "'' in the layout"),
        ("replica=two", "is not an axis and a number"),
        ("replica=-1", "is not an axis and a number"),
        ("data=2", "names 'data'; there are replica, shard, tensor"),
        ("tensor=2,tensor=2", "'tensor' twice"),
        ("tensor=0", "'tensor' .* cannot be 0"),
        ("replica=1000000,tensor=1000000", "ranks; at most"),
        ("zero=1", "names no axis"),
        ("replica=2,zero=4", "stage 4; there are 1, 2 and 3"),
        ("shard=2,zero=1", "no replicas for ZeRO"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_with_what_is_wrong(text: str, message: str):
    with pytest.raises(FormatError, match=message):
        parse_layout(text)


# --------------------------------------------------------------------------- twelve layouts of a model

LAYERS = 3
LAYOUTS = [
    "replica=2",
    "replica=2,zero=1",
    "replica=2,zero=2,align=2",
    "replica=3,zero=3",
    "shard=4",
    "replica=2,shard=2",
    "tensor=2",
    "tensor=4",
    "pipeline=2",
    "pipeline=2,tensor=2",
    "replica=2,tensor=2,zero=1",
    "expert=2",
    "replica=5,zero=1",
    "shard=3",
    "shard=2,tensor=2",
    "replica=2,expert=2,zero=1",
]


def roles_of_a_model(scheme: Scheme) -> dict[str, Role]:
    """A small mixture of experts with tied embeddings, and both Adam moments of everything."""
    sizes = dict(scheme.mesh.axes)
    stages = sizes.get("pipeline", 1)
    where = StageMap(
        deal_layers(LAYERS, stages),
        {"embedding": (0, stages - 1) if stages > 1 else (0,), "norm": (stages - 1,)},
    )
    experts = ExpertMap(tuple(e // (4 // sizes.get("expert", 1)) for e in range(4)))
    weights: dict[str, tuple[tuple[int, ...], dict]] = {
        "embedding": ((12, 5), {"tensor": Shard(0)}),
        "norm": ((5,), {}),
    }
    for layer in range(LAYERS):
        weights[f"layers.{layer}.column"] = ((8, 5), {"tensor": Shard(0)})
        weights[f"layers.{layer}.row"] = ((5, 8), {"tensor": Shard(1)})
        for expert in range(4):
            weights[f"layers.{layer}.experts.{expert}.up"] = ((4, 5), {"tensor": Shard(0)})
    roles = {}
    for name, (shape, on) in weights.items():
        placed = {**on, "pipeline": where.placement(name)}
        if found := experts.placement(name):
            placed["expert"] = found
        roles[name] = Role(shape, placed)
        for moment in ("exp_avg", "exp_avg_sq"):
            roles[f"{moment}/{name}"] = Role(shape, placed, moment)
    return roles


@pytest.mark.parametrize("text", LAYOUTS)
def test_every_layout_covers_a_model_and_its_moments_as_often_as_it_has_copies(text: str):
    scheme = parse_layout(text)
    roles = roles_of_a_model(scheme)
    layout = arrange(scheme, roles)
    shapes = {name: role.shape for name, role in roles.items()}
    held = {name: np.zeros(shape, int) for name, shape in shapes.items()}
    for rank in range(scheme.mesh.size):
        for name, parts in share_of(layout, shapes, rank).items():
            for part in parts:
                held[name][slices(part.box)] += 1
    grouped = {name: group.axes for group in layout.flats for name in group.names}
    for name, counts in held.items():
        copies = 1
        for (axis, ranks), placement in zip(scheme.mesh.axes, layout.placements[name], strict=True):
            if placement == Replicate() and axis not in grouped.get(name, ()):
                copies *= ranks
            if isinstance(placement, Only):
                copies *= len(placement.coordinates)
        assert (counts == copies).all(), name
    if scheme.zero and "tensor" not in text:  # the moments exist once; weights too at stage 3
        assert all((held[name] == 1).all() for name in held if "/" in name or scheme.zero == 3)


def test_zero_1_keeps_one_buffer_a_moment_over_all_parameters_of_a_stage():
    scheme = parse_layout("replica=4,zero=1")
    layout = arrange(scheme, roles_of_a_model(scheme))
    assert [group.names[0].partition("/")[0] for group in layout.flats] == ["exp_avg", "exp_avg_sq"]
    assert len(layout.flats[0].names) == 2 + LAYERS * 6


def test_a_sharded_dim_that_tensor_ranks_divide_too_becomes_a_strided_shard():
    layout = arrange(
        parse_layout("shard=2,tensor=4"), {"w": Role((16, 2), {"tensor": Shard(0)}), "s": Role(())}
    )
    assert layout.placements == {"w": (StridedShard(0, 4), Shard(0)), "s": (Replicate(), Replicate())}
    with pytest.raises(FormatError, match=r"tensor 'w'.*into sections"):
        arrange(parse_layout("shard=2,tensor=2"), {"w": Role((4,), {"tensor": SectionShard(0, ((2, 2),))})})


# ------------------------------------------------------------------------------------- stages, experts


def test_layers_are_dealt_to_stages_in_order():
    assert deal_layers(7, 3) == (0, 0, 0, 1, 1, 2, 2)
    assert deal_layers(8, 2) == (0, 0, 0, 0, 1, 1, 1, 1)
    with pytest.raises(FormatError, match="2 layers cannot be dealt to 3 stages"):
        deal_layers(2, 3)


def test_a_stage_map_places_layers_by_number_and_the_ends_by_name():
    where = StageMap((0, 0, 1), {"embed.*": (0, 1), "head": (1,)})
    assert where.placement("model.layers.2.w") == Only((1,))
    assert where.placement("embedding") == Only((0, 1))
    for name in ("layers.3.w", "norm"):
        with pytest.raises(FormatError, match=repr(name)):
            where.placement(name)


def test_an_expert_map_places_experts_and_nothing_else():
    where = ExpertMap((0, 0, 1))
    assert where.placement("layers.0.experts.2.up") == Only((1,))
    assert where.placement("layers.0.router") is None
    with pytest.raises(FormatError, match="none of the 3 experts"):
        where.placement("layers.0.experts.3.up")


# --------------------------------------------------------------------------------------------- as data


@given(st.data(), meshes)
def test_a_layout_survives_as_json(data, mesh):
    chosen = {
        f"tensor{number}": data.draw(placements(mesh, (math.prod(size for _, size in mesh.axes), 3)))
        for number in range(data.draw(st.integers(0, 4)))
    }
    axes = tuple(axis for axis, _ in mesh.axes)
    flats = tuple(FlatGroup((name,), axes, 2, 3) for name in chosen)
    ranks = data.draw(st.sampled_from([(), tuple(reversed(range(mesh.size)))]))
    layout = Layout(Mesh(mesh.axes, ranks), chosen, flats)
    stored = dump_json(layout_to_json(layout), "a layout")
    assert layout_from_json(parse_json(stored, "a layout")) == layout


def test_tensors_that_are_placed_alike_share_one_entry():
    layout = Layout(Mesh((("shard", 2),)), {f"w{n}": (Shard(0),) for n in range(1000)})
    stored = layout_to_json(layout)
    assert isinstance(stored, dict)
    assert isinstance(stored["tensors"], list)
    assert len(stored["tensors"]) == 1


def broken_layouts():
    sound = layout_to_json(
        Layout(Mesh((("shard", 2),)), {"w": (Partial(),)}, (FlatGroup(("w",), ("shard",)),))
    )
    assert isinstance(sound, dict)
    yield {**sound, "more": 1}
    yield {name: value for name, value in sound.items() if name != "axes"}
    yield {**sound, "axes": [["shard", 2], ["shard", 2]]}
    yield {**sound, "axes": [["shard", 1 << 19], ["tensor", 1 << 19]]}
    yield {**sound, "axes": [["shard"]]}
    yield {**sound, "axes": [["shard", True]]}
    yield {**sound, "ranks": [0]}
    yield {**sound, "ranks": [0, -1]}
    yield {**sound, "tensors": [{"placements": [{"kind": "shard", "dim": "0"}], "names": ["w"]}]}
    yield {**sound, "tensors": [{"placements": [{"kind": "spiral"}], "names": ["w"]}]}
    yield {**sound, "tensors": [{"placements": [{"kind": "partial", "dim": 0}], "names": ["w"]}]}
    yield {**sound, "tensors": [{"placements": [], "names": ["w", "w"]}]}
    yield {**sound, "tensors": [{"placements": [], "names": ["w"]}] * 2}
    yield {**sound, "flats": [{"names": ["w"], "axes": ["shard"], "start_multiple": 1}]}
    yield []


@pytest.mark.parametrize("node", list(broken_layouts()), ids=str)
def test_hostile_data_is_no_layout(node):
    with pytest.raises(Corrupt):
        layout_from_json(node)
