"""Rows beyond the vocabulary: looked at on all ranks, told, and never words."""

import numpy as np
import pytest

from checkpoint.errors import Misuse
from checkpoint.interop.builtin import builtin_rules
from checkpoint.interop.conversion.importing import Adoption, import_checkpoint
from checkpoint.interop.conversion.ruled import RuleChoice
from checkpoint.interop.formats.contract import About
from checkpoint.interop.formats.megatron_arguments import sizes_of
from checkpoint.interop.moves import Foreign
from checkpoint.store.memory import MemoryStore
from tests.interop_samples import LLAMA, Files, Shards, llama, megatron_llama

ARGUMENTS = {"padded_vocab_size": 12, "make_vocab_size_divisible_by": 2, "tensor_model_parallel_size": 1}


def converted(shards: Shards, sizes=LLAMA, said=None):
    """Import the shards of a Llama; return the notes."""
    files = Files([one for one, _ in shards], [bits for _, bits in shards].__getitem__)
    files.about = About("files", {"tensor": 3, "pipeline": 2}, sizes=said or {})
    choice = RuleChoice(builtin_rules("llama-megatron"), sizes)
    return import_checkpoint(files, "files:", MemoryStore("target"), Adoption(rules=choice)).notes


def without_values(one: Foreign, bits: np.ndarray) -> np.ndarray:
    is_last = "embedding" in one.name or "output" in one.name
    return np.vstack([bits[:-1], np.zeros_like(bits[-1:])]) if is_last and one.at["tensor"] == 2 else bits


def test_padding_is_told_with_its_rows_and_whether_there_is_anything_in_it():
    shards = megatron_llama(llama(), (1, 1, 1), (2, 2))  # rubbish in the last row of both copies
    (note,) = converted(shards)
    assert note.startswith("1 rows of padding are left out of model/embedding.weight: they hold values")
    empty = [(one, without_values(one, bits)) for one, bits in shards]
    (note,) = converted(empty)
    assert note.endswith("model/embedding.weight: all of it zero")
    (number,) = [n for n, (one, _) in enumerate(shards) if "output" in one.name and one.at["tensor"] == 2]
    (note,) = converted(
        [*empty[:number], shards[number], *empty[number + 1 :]]
    )  # the last stage's copy alone
    assert "they hold values" in note


def test_a_vocabulary_of_fewer_words_than_the_files_tell_is_refused():
    shards = megatron_llama(llama(), (1, 1, 1), (2, 2))
    for said in ({"vocab": 12}, sizes_of(ARGUMENTS, ())):
        with pytest.raises(Misuse, match=r"vocab=10 would leave out words .* at least 1[12]"):
            converted(shards, {**LLAMA, "vocab": 10}, said)
    assert len(converted(shards, LLAMA, {"vocab_at_least": 11})) == 1


def test_what_megatron_pads_to_tells_the_least_vocabulary():
    assert sizes_of(ARGUMENTS, ())["vocab_at_least"] == 11
    assert "vocab_at_least" not in sizes_of({**ARGUMENTS, "vocab_size": 9}, ())
    assert "vocab_at_least" not in sizes_of({"padded_vocab_size": 12}, ())
