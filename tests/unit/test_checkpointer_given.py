"""What save is given is taken, or refused at once and by name: nothing is lost after save has returned."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from checkpoint.checkpointer import Checkpointer, Options
from checkpoint.engine.given import plain_meta
from checkpoint.engine.per_rank import PerRank
from checkpoint.engine.reading import ReadPolicy
from checkpoint.engine.save import SavePolicy
from checkpoint.errors import FormatError, Mismatch, StoreRefused, Unsupported
from checkpoint.format import tree
from checkpoint.format.codec import Codec
from checkpoint.lifecycle.policies import LatestN
from checkpoint.store.open import open_store

SMALL = Options(arena_mib=8)


@pytest.fixture
def checkpointer(tmp_path):
    with Checkpointer(f"memory://{tmp_path}", options=SMALL) as made:
        yield made


def test_numbers_of_every_library_are_metrics_and_those_that_are_not_finite_stay_so(checkpointer):
    given = {
        "float": 0.5, "int": 2, "bool": True, "numpy": np.float32(0.25), "array": np.array([3.0]),
        "tensor": torch.tensor(1.5), "with a gradient": nn.Parameter(torch.tensor([2.5])),
        "half": torch.tensor(0.5, dtype=torch.bfloat16), "nan": math.nan, "inf": torch.tensor(-math.inf),
    }  # fmt: skip
    saving = checkpointer.save(1, {"w": torch.zeros(2)}, metrics=given)
    assert saving.durable().result(20).step == 1
    found = checkpointer.restore({"w": torch.zeros(2)}).metrics
    assert found.keys() == given.keys() and {type(value) for value in found.values()} == {float}
    assert math.isnan(found.pop("nan"))
    assert list(found.values()) == [0.5, 2.0, 1.0, 0.25, 3.0, 1.5, 2.5, 0.5, -math.inf]


@pytest.mark.parametrize(
    ("metrics", "says"),
    [
        ({"loss": None}, "metric 'loss' is None, a NoneType: give a number"),
        ({"loss": "0.5"}, "metric 'loss' is '0.5', a str"),
        ({"loss": torch.zeros(2)}, r"metric 'loss' is of shape \[2\], a Tensor"),
        ({"loss": 1j}, "metric 'loss' is 1j, a complex"),
        ({"loss": 10**400}, "metric 'loss' is 1000"),
        ({3: 0.5}, "a metric's name is a str, not 3"),
        ([0.5], r"metrics are numbers by name, and \[0.5\] is a list"),
    ],
)
def test_what_is_no_number_is_refused_by_the_metric_s_name(checkpointer, metrics, says):
    with pytest.raises(Unsupported, match=says):
        checkpointer.save(1, {"w": torch.zeros(2)}, metrics=metrics)
    assert checkpointer.save(1, {"w": torch.zeros(2)}) is not None  # the step is still free


def test_a_cursor_is_plain_json_numbers_become_plain_and_tuples_lists(checkpointer):
    cursor = {
        "epoch": np.int64(3),
        "at": (1, torch.tensor(2)),
        "seen": [0.5, None, "a", True],
        "share": np.float32(0.5),
    }
    saving = checkpointer.save(1, {"w": torch.zeros(2)}, cursor=cursor)
    assert saving.durable().result(20).step == 1
    found = checkpointer.restore({"w": torch.zeros(2)}).cursor
    assert found == {"epoch": 3, "at": [1, 2], "seen": [0.5, None, "a", True], "share": 0.5}


@pytest.mark.parametrize(
    ("cursor", "says"),
    [
        ({"at": {1, 2}}, r"data_cursor/at is \{1, 2\}, a set, which plain JSON cannot hold"),
        ({"at": [0, math.nan]}, "data_cursor/at/1 is nan, a float"),
        ({"at": {7: "seven"}}, "data_cursor/at has the key 7: JSON's are text"),
        ({"at": b"raw"}, "data_cursor/at is b'raw', a bytes"),
        ({"at": torch.zeros(3)}, r"data_cursor/at is of shape \[3\], a Tensor"),
        ({"at": 10**5000}, "beside the state is not plain JSON"),
    ],
)  # fmt: skip
def test_a_cursor_that_no_manifest_could_hold_is_refused_by_its_path(checkpointer, cursor, says):
    with pytest.raises(FormatError, match=says):
        checkpointer.save(1, {"w": torch.zeros(2)}, cursor=cursor)


@pytest.mark.parametrize(
    ("step", "error", "says"),
    [
        ("5", TypeError, "a step is a whole number, and '5' is a str: give an int"),
        (2.0, TypeError, "2.0 is a float"),
        (10**12, ValueError, "from 0 to 999999999999, not 1000000000000"),
        (-1, ValueError, "from 0 to 999999999999, not -1"),
    ],
)
def test_a_step_that_is_none_is_told_what_steps_are(checkpointer, step, error, says):
    with pytest.raises(error, match=says):
        checkpointer.save(step, {"w": torch.zeros(2)})
    with pytest.raises(error, match=says):
        checkpointer.restore({"w": torch.zeros(2)}, step=step)


def test_a_step_of_numpy_s_is_a_step(checkpointer):
    assert checkpointer.save(np.int64(7), {"w": torch.zeros(2)}).durable().result(20).step == 7


def _itself() -> Any:
    loop: list[Any] = []
    loop.append(loop)
    return loop


def _deep() -> Any:
    value: Any = 1
    for _ in range(5000):
        value = [value]
    return value


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "contains itself": (_itself, r"bad/0/0/.* is nested deeper than 64 levels: does it contain itself"),
    "too deep": (_deep, r"bad/0/0/.* is nested deeper than 64 levels"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "^bad: a nested tensor"),
    "jagged": (
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        r"^bad: a NestedTensor \(torch.jagged",
    ),
    "quantized": (lambda: torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.quint8), "^bad: "),
    "bits": (lambda: torch.empty(4, dtype=torch.bits8), "^bad: .*bits8"),
    "scattered float4": (
        lambda: torch.zeros(4, 4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2).t(),
        r"^bad: .*float4_e2m1fn_x2.* contiguous\(\)",
    ),
    "meta": (lambda: torch.empty(3, device="meta"), r"^bad: a Tensor .*meta"),
    "numpy": (lambda: np.zeros(3), "^bad is a numpy.ndarray"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own, of nested and quantized tensors
@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_plain_form_is_refused_by_its_path(checkpointer, name):
    make, says = REFUSED[name]
    bad = make()
    for state in ({"bad": bad}, {"bad": bad, "w": torch.zeros(2)}):
        with pytest.raises(FormatError, match=says):
            checkpointer.save(1, state)
    if name not in ("contains itself", "too deep"):
        with pytest.raises(FormatError, match=says.replace("^bad", "^own/bad")):
            checkpointer.save(1, {"own": PerRank({"bad": bad})})


WITHOUT_MEMORY: dict[str, Callable[[], torch.Tensor]] = {
    "coo": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "meta": lambda: torch.ones(3, device="meta"),
    "lazy buffer": UninitializedBuffer,
    "lazy parameter": UninitializedParameter,
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's own, of nested and sparse tensors
@pytest.mark.parametrize("name", WITHOUT_MEMORY)
def test_a_part_of_a_module_that_has_no_plain_memory_is_refused_by_its_path(checkpointer, name):
    value = WITHOUT_MEMORY[name]()
    module = nn.Module()
    if isinstance(value, nn.Parameter):
        module.register_parameter("part", value)
    else:
        module.register_buffer("part", value)
    with pytest.raises(Unsupported, match=r"^model/part: "):
        checkpointer.save(1, {"model": module})
    with pytest.raises(Unsupported, match=r"^own/part: "):
        checkpointer.save(1, {"own": PerRank({"part": value})})
    full = nn.Module()
    full.register_buffer("part", torch.eye(3))
    assert checkpointer.save(1, {"model": full}).durable().result(20).step == 1
    with pytest.raises(Unsupported, match=r"^model/part: "):
        checkpointer.restore({"model": module})


def test_a_contiguous_float4_comes_back(checkpointer):
    packed = torch.arange(200_000, dtype=torch.int32).to(torch.uint8)
    saving = checkpointer.save(
        1, {"w": packed.view(torch.float4_e2m1fn_x2), "s": packed[:9].view(torch.float4_e2m1fn_x2)}
    )
    assert saving.durable().result(20).step == 1
    again: dict[str, Any] = {
        "w": torch.zeros(200_000, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "s": None,
    }
    checkpointer.restore(again)
    assert torch.equal(again["w"].view(torch.uint8), packed)


def test_a_target_whose_elements_are_one_in_memory_is_refused_by_name(checkpointer):
    saving = checkpointer.save(1, {"w": torch.arange(6.0).reshape(2, 3)})
    assert saving.durable().result(20).step == 1
    with pytest.raises(Mismatch, match="'w' is expanded"):
        checkpointer.restore({"w": torch.zeros(3).expand(2, 3)})
    again = {"w": torch.zeros(3, 2).t()}
    checkpointer.restore(again)
    assert torch.equal(again["w"], torch.arange(6.0).reshape(2, 3))


def test_long_lists_of_numbers_are_looked_at_as_a_whole_and_not_walked(checkpointer, monkeypatch):
    looked: list[object] = []
    one_by_one = tree._scalar

    def counted(value: Any, path: tuple[str, ...]) -> Any:
        looked.append(value)
        return one_by_one(value, path)

    monkeypatch.setattr(tree, "_scalar", counted)
    state = {"order": list(range(300_000)), "share": (0.5,) * 1000, "deep": [[1, 2]] * 3, "w": torch.zeros(2)}
    saving = checkpointer.save(1, state)
    assert saving.durable().result(60).step == 1 and len(looked) < 10
    again: dict[str, Any] = {"order": None, "share": None, "deep": None}
    checkpointer.restore(again)
    assert again == {name: state[name] for name in again}


def test_plain_values_that_no_manifest_could_hold_are_refused_with_advice(checkpointer, monkeypatch):
    monkeypatch.setattr("checkpoint.engine.save.MAX_SKELETON_BYTES", 100_000)
    with pytest.raises(
        Unsupported, match=r"plain values of the state take .* at most .* is 'order'.*torch.tensor"
    ):
        checkpointer.save(1, {"order": list(range(100_000)), "w": torch.zeros(2)})


def test_a_path_may_begin_with_a_tilde_and_a_url_with_one_slash_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    open_store("~/ckpt").put_new("a", b"x")
    assert (tmp_path / "ckpt" / "a").read_bytes() == b"x"
    for typo in ("s3:/bucket/run", "file:/tmp/x", "S3:/x"):
        with pytest.raises(StoreRefused, match=r"names no store: .*://"):
            open_store(typo)
    assert str(open_store(str(tmp_path / "run:1"))).endswith("run:1")


def test_a_directory_in_a_manifest_s_place_is_one_clear_error(tmp_path):
    tmp_path.chmod(0o700)
    options = Options(arena_mib=2, lease_s=0.3, directory=tmp_path / "keeper")
    (tmp_path / "store" / "manifests" / "000000000001").mkdir(parents=True)
    with Checkpointer(str(tmp_path / "store"), options=options) as checkpointer:
        assert checkpointer.latest() is None and checkpointer.restore({"w": None}) is None
        saving = checkpointer.save(1, {"w": torch.zeros(2)})
        assert saving is not None
        why = str(saving.durable().exception(20))
        assert "manifests/000000000001" in why and "is taken and holds no manifest" in why


def test_meta_of_any_name_is_plain_and_a_spec_is_left_alone():
    assert plain_meta({"spec_digest": "ab", "own": {"x": (1, 2)}}) == {
        "spec_digest": "ab",
        "own": {"x": [1, 2]},
    }


def test_a_place_may_be_a_path(tmp_path):
    assert Checkpointer(tmp_path / "store").latest() is None


def test_a_state_without_a_path_is_called_so(checkpointer):
    checkpointer.save(1, {"w": torch.zeros(2)}).durable().result(20)
    with pytest.raises(Mismatch, match="does not fit the state; absent: bias, weight; unknown here: w"):
        checkpointer.restore(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"url": 5}, TypeError, "a store's place is a URL or a path, not 5"),
        ({"every": 2.5}, ValueError, "every 2.5 steps"),
        ({"memory": -1}, ValueError, "-1 held in memory"),
        ({"run": ""}, ValueError, "a run has a name"),
        ({"keep": 3}, ValueError, "'3' is no retention policy"),
        ({"keep": [LatestN(3), None]}, ValueError, "'None' is no retention policy"),
    ],
)
def test_what_a_checkpointer_cannot_be_made_of_is_said_when_it_is_made(tmp_path, wrong, error, says):
    given = {"url": str(tmp_path / "store"), **wrong}
    with pytest.raises(error, match=says):
        Checkpointer(given.pop("url"), **given)


@pytest.mark.parametrize(
    ("make", "wrong", "told"),
    [
        (SavePolicy, {"codec": "gzip"}, r"`codec` is one of 'raw', 'zstd', 'planes', not 'gzip'"),
        (SavePolicy, {"codec": 7}, "`codec`"),
        (SavePolicy, {"when_full": "maybe"}, "`when_full` is 'wait' or 'skip', not 'maybe'"),
        (SavePolicy, {"delta_chain": -1}, "`delta_chain`"),
        (SavePolicy, {"level": 99}, "`level`"),
        (SavePolicy, {"level": "1"}, "`level`"),
        (SavePolicy, {"max_wait_s": math.nan}, "`max_wait_s`"),
        (ReadPolicy, {"patience_s": -1}, "`patience_s`"),
        (ReadPolicy, {"empty_patience_s": "15"}, "`empty_patience_s`"),
        (ReadPolicy, {"num_threads": 0}, "`num_threads`"),
        (Options, {"arena_mib": "4"}, "`arena_mib`"),
        (Options, {"arena_mib": 0}, "`arena_mib`"),
        (Options, {"flush_s": -1}, "`flush_s`"),
        (Options, {"kept": "somewhere"}, "`kept`"),
        (Options, {"tiers": "s3://bucket/far"}, "`tiers`"),
        (Options, {"saving": {"level": 1}}, "`saving`"),
        (partial(Checkpointer, "memory://never"), {"options": 3}, "`options` is a Options, not 3"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_by_name_when_it_is_made(make, wrong, told):
    with pytest.raises((TypeError, ValueError), match=told):
        make(**wrong)


def test_a_codec_may_be_given_by_its_name(tmp_path):
    named: dict[str, Any] = {"codec": "zstd"}
    assert SavePolicy(**named).codec is Codec.ZSTD
    options = Options(saving=SavePolicy(**named), arena_mib=8)
    with Checkpointer(f"memory://{tmp_path}", options=options) as checkpointer:
        saving = checkpointer.save(1, {"w": torch.zeros(2)})
        assert saving is not None and saving.durable().result(20).step == 1
