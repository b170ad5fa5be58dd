"""Values that rules change on the way: the same bits by two ways, and never to infinity without a word."""

import numpy as np
import pytest
import torch

import checkpoint
from checkpoint.errors import Mismatch, Misuse
from checkpoint.format.box import Box
from checkpoint.interop.builtin import find_document
from checkpoint.interop.conversion.contract import ConversionReport, ConversionSettings, Overflow
from checkpoint.interop.conversion.emigrating import Emigration
from checkpoint.interop.conversion.foreign import Whereabouts, export_foreign
from checkpoint.interop.conversion.importing import Adoption, import_checkpoint
from checkpoint.interop.conversion.ruled import RuleChoice
from checkpoint.interop.conversion.stored import Stored
from checkpoint.interop.grammar import read_rules
from checkpoint.interop.moves import Foreign
from checkpoint.store.memory import MemoryStore
from tests.conversion_samples import save_state
from tests.interop_samples import Files

ALLOWED = ConversionSettings(overflow=Overflow.ALLOWED)
MEAN = "{from: w, to: w, axes: {tensor: mean}}"


def rules(*lines: str) -> RuleChoice:
    text = "rules: 1\nname: changing\nmap:\n" + "".join(f"  - {line}\n" for line in lines)
    return RuleChoice(read_rules(text, "changing", find_document))


def taken_over(
    arrays: list[np.ndarray], line: str, settings: ConversionSettings | None = None
) -> tuple[ConversionReport, np.ndarray]:
    """Import what several ranks have of one tensor, and return the report and the bits."""
    words = [one.view(f"<u{one.itemsize}") for one in arrays]
    ranks = [Foreign("w", one.dtype.name, one.shape, {"tensor": rank}) for rank, one in enumerate(arrays)]
    files, store = Files(ranks, lambda number: words[number], {"tensor": len(arrays)}), MemoryStore("target")
    report = import_checkpoint(files, "x", store, Adoption(rules=rules(line)), settings=settings)
    stored = Stored(store)
    return report, stored.read([(0, Box.whole(stored.tensors[0].shape))])[0]


@pytest.mark.parametrize("num_ranks", [2, 5, 8, 32])
@pytest.mark.parametrize("shape", [(), (1000,), (33, 3)])
def test_an_average_of_doubles_has_the_same_bits_by_both_ways(num_ranks, shape):
    random = np.random.default_rng(num_ranks)
    values = [np.asarray(random.standard_normal(shape)) for _ in range(num_ranks)]
    report, bits = taken_over(values, MEAN)
    assert [one.how for one in report.proofs] == ["reference"]
    assert np.allclose(bits.view("f8"), np.mean(values, axis=0))


def test_an_average_of_what_is_no_number_and_of_signed_zeros_has_the_same_bits_by_both_ways():
    odd = np.array([np.inf, np.nan, -0.0, 1.0])
    _, bits = taken_over([odd, np.array([-np.inf, 1.0, -0.0, np.inf])], MEAN)
    assert bits.tolist() == np.array([np.nan, np.nan, -0.0, np.inf]).view("<u8").tolist()


@pytest.mark.parametrize(
    ("value", "dtype", "line", "new"),
    [
        (7e4, "float32", "{from: w, to: w, axes: {tensor: mean}, dtype: float16}", "float16"),
        (1.5e308, "float64", MEAN, "float64"),
    ],
)
def test_an_average_that_becomes_infinite_is_refused_unless_that_is_allowed(value, dtype, line, new):
    ranks = [np.array([value, 1.0, np.inf], dtype)] * 2
    with pytest.raises(Misuse, match=f"1 elements of model/w are beyond {new}"):
        taken_over(ranks, line)
    report, _ = taken_over(ranks, line, ALLOWED)
    assert report.notes == (f"1 elements of model/w are beyond {new}, and became infinite",)


def test_what_is_lost_is_counted_once_however_many_ranks_have_copies():
    ranks = [np.array([7e4, 1.0], "float32")] * 3
    report, _ = taken_over(ranks, "{from: w, to: w, axes: {tensor: same}, dtype: float16}", ALLOWED)
    assert report.notes == ("1 elements of model/w are beyond float16, and became infinite",)


def test_an_export_of_a_foreign_source_whose_rules_cast_tells_what_that_loses(tmp_path):
    torch.save({"w": torch.tensor([1.0, 7e4]), "b": torch.ones(2)}, tmp_path / "a.pt")
    cast = rules("{from: w, to: w, dtype: float16}", "{from: b, to: b}")
    source, out = Whereabouts(str(tmp_path / "a.pt"), rules=cast), tmp_path / "out"
    with pytest.raises(Misuse, match="1 elements of model/w are beyond float16"):
        export_foreign(source, str(out), Emigration("torch"))
    assert not out.exists()
    report = export_foreign(source, str(out), Emigration("torch"), settings=ALLOWED)
    assert {one.name: one.how for one in report.proofs} == {"model/w": "reference", "model/b": "fingerprint"}
    assert any("1 elements of model/w are beyond float16" in note for note in report.notes)


@pytest.mark.parametrize(
    ("array", "line", "told"),
    [
        (np.ones(2, "float32"), "{from: w, to: w, axes: {tensor: same}, dtype: int32}", "cast to int32"),
        (np.ones(2, "float32"), "{from: w, to: w, axes: {tensor: same}, dtype: bool}", "cast to bool"),
        (np.ones(2, "int64"), "{from: w, to: w, axes: {tensor: same}, dtype: float32}", "is int64"),
        (
            np.ones(2, "float32"),
            "{from: w, to: w, axes: {tensor: 0}, dtype: float8_e4m3fn}",
            "cast to float8",
        ),
        (np.ones(2, "int64"), MEAN, "is int64, and cannot be averaged"),
    ],
)
def test_what_are_no_floats_is_neither_cast_nor_averaged(array, line, told):
    with pytest.raises(Misuse, match=rf"w \(tensor=0\) .*{told}.*only float16, bfloat16"):
        taken_over([array, array], line)


def test_what_would_be_averaged_on_the_way_in_is_written_out_as_copies(tmp_path):
    url, out = str(tmp_path / "store"), tmp_path / "out"
    odd = torch.tensor([0.1, 1.7e308, float("inf"), -0.0], dtype=torch.float64)
    save_state(checkpoint.open_store(url), {"model": {"w": odd, "v": torch.arange(5)}})
    out_by = rules(MEAN, "{from: v, to: v, axes: {tensor: 0}}")
    report = export_foreign(Whereabouts(url), str(out), Emigration("megatron", "tensor=5", out_by))
    assert [one.how for one in report.proofs] == ["fingerprint"] * 2


TWICE = ("{from: a, to: w, axes: {tensor: mean}}", "{from: b, to: w, axes: {tensor: mean}, copy: required}")


def averaged_twice(one: list[np.ndarray], two: list[np.ndarray]) -> ConversionReport:
    """Import an average that is there by two names."""
    words = [value.view("<u8") for value in (*one, *two)]
    named = [
        Foreign(name, "float64", one[0].shape, {"tensor": rank}) for name in "ab" for rank in range(len(one))
    ]
    files = Files(named, lambda number: words[number], {"tensor": len(one)})
    return import_checkpoint(files, "x", MemoryStore("target"), Adoption(rules=rules(*TWICE)))


def test_an_average_and_its_copy_are_averages_each_of_its_own():
    random = np.random.default_rng(0)
    values = [random.standard_normal((40, 3)) for _ in range(3)]
    assert [one.how for one in averaged_twice(values, values).proofs] == ["reference"]


def test_an_average_whose_copy_is_another_is_told_to_differ():
    values = [np.arange(120.0).reshape(40, 3)] * 3
    with pytest.raises(Mismatch, match=r"'model/w': the copies in a .* and b .* differ"):
        averaged_twice(values, [values[0], values[1], values[2] + 3])
