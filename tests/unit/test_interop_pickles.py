"""Pickles are read without being carried out: whatever they ask for, nothing happens, and it is said."""

import io
import os
import pickle
import pickletools
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoint.errors import CheckpointError, Corrupt, Unsupported
from checkpoint.interop.formats.inert import PLAIN, load_inert, plain
from checkpoint.interop.formats.known import open_foreign
from checkpoint.interop.formats.opcodes import end_of_pickle


def refuse(pid: Any) -> Any:
    raise Corrupt(f"it refers to {pid}")


def read(data: bytes) -> Any:
    return plain(load_inert(data, "x.pkl", {}, refuse), "x.pkl")


class Calls:
    """Pickles as a call of anything."""

    def __init__(self, what: Any, *args: Any) -> None:
        self._reduced = what, args

    def __reduce__(self) -> Any:
        return self._reduced


def attacks(mark: Path) -> dict[str, bytes]:
    """Return pickles that would do something, if anybody let them."""
    command = f"touch {mark}"
    module, name = os.system.__module__, "system"
    slots = b"\x80\x02ccollections\nOrderedDict\n(N}U\x08__init__cposix\nsystem\nstb."
    polluting = b"\x80\x02ctorch\nSomething\n(N}U\x05fieldK\x01stb."
    return {
        "a call of os.system": pickle.dumps(Calls(os.system, command), 2),
        "the same in protocol 4": pickle.dumps(Calls(os.system, command), 4),
        "eval": pickle.dumps(Calls(eval, f"__import__('os').system('{command}')"), 2),
        "exec within a state_dict": pickle.dumps({"weight": Calls(exec, f"open('{mark}', 'w')")}, 2),
        "subprocess": pickle.dumps(Calls(subprocess.check_output, ["touch", str(mark)]), 2),
        "getattr": pickle.dumps(Calls(getattr, OrderedDict, "clear"), 4),
        "a dotted name": b"\x80\x04\x8c\x05torch\x8c\x0bos.system.x\x93)R.",
        "builtins by another name": b"\x80\x02c__builtin__\neval\nX\x04\x00\x00\x001+1\x00\x85R.",
        "an instance in the old way": f"(S'{command}'\ni{module}\n{name}\n.".encode(),
        "an object in the old way": b"\x80\x02(c" + f"{module}\n{name}\n".encode() + b"X\x01\x00\x00\x00xo.",
        "a registered extension": b"\x80\x02\x82\x01.",
        "slots of a class": slots,
        "attributes of a stand-in's class": polluting,
        "a persistent name as text": b"\x80\x02Pabc\n.",
        "torch's own way to load bytes": pickle.dumps(Calls(torch.storage._load_from_bytes, b"x"), 2),
    }


@pytest.mark.parametrize("name", list(attacks(Path("x"))))
def test_a_hostile_pickle_is_a_clear_error_and_executes_nothing(name, tmp_path):
    mark = tmp_path / "executed"
    data = attacks(mark)[name]
    if name in ("torch's own way to load bytes", "a dotted name"):  # a record of what was asked for
        assert read(data)["class"].startswith("torch.")
    else:
        with pytest.raises((Corrupt, Unsupported), match=r"x\.pkl"):
            read(data)
    assert not mark.exists()


@pytest.mark.parametrize("name", list(attacks(Path("x"))))
@pytest.mark.parametrize("kind", ["zip", "legacy", "metadata"])
def test_a_hostile_file_of_any_format_executes_nothing(name, kind, tmp_path):
    mark = tmp_path / "executed"
    data = attacks(mark)[name]
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    if kind == "zip":
        with zipfile.ZipFile(folder / "x.pt", "w") as archive:
            archive.writestr("archive/data.pkl", data)
            archive.writestr("archive/version", "3\n")
    elif kind == "legacy":
        start = io.BytesIO()
        torch.save({}, start, _use_new_zipfile_serialization=False)
        ends = [0]
        for _ in range(3):
            ends.append(end_of_pickle(start.getvalue(), ends[-1], "x") or 0)
        (folder / "x.pt").write_bytes(start.getvalue()[: ends[-1]] + data + pickle.dumps([], 2))
    else:
        (folder / ".metadata").write_bytes(data)
        (folder / "__0_0.distcp").write_bytes(b"x")
    with pytest.raises(CheckpointError):
        open_foreign(str(folder))
    assert not mark.exists()


@pytest.mark.parametrize(
    "data",
    [
        attacks(Path("x"))["attributes of a stand-in's class"],
        b"\x80\x02cbuiltins\nint\n(N}U\x04textK\x01stb.",
        b"\x80\x02cbuiltins\nint\n]K\x01ab.",
        b"\x80\x02ctorch\nfloat32\n]U\x07float64ab.",
        b"\x80\x02c_codecs\nencode\n(N}U\x0c__defaults__K\x01\x85stb.",
        b"\x80\x02c_codecs\nencode\n}U\x01xK\x01sb.",
        b"\x80\x02ccollections\nOrderedDict\n}U\x01xK\x01sb.",
        b"\x80\x02cbuiltins\ncomplex\n}U\x01xK\x01sb.",
    ],
)
def test_a_pickle_cannot_change_the_stand_ins_for_those_that_come_after_it(data):
    with pytest.raises(Corrupt):
        read(data)
    after = {"dtype": torch.float32, "bytes": b"\xff", "dict": OrderedDict(a=1)}
    assert read(pickle.dumps(after, 2)) == {"dtype": "float32", "bytes": b"\xff", "dict": {"a": 1}}
    assert read(b"\x80\x02cbuiltins\nint\n.") == "int"


def test_a_tensor_cannot_be_changed_after_it_was_checked(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    data = (tmp_path / "x.pt").read_bytes()
    made = data.index(b"R", data.index(b"OrderedDict\n") + 20)  # the second call: the first makes its hooks
    (tmp_path / "x.pt").write_bytes(data[: made + 1] + b"(K\x00K\x00K\x00K\x00K\x00lb" + data[made + 1 :])
    with pytest.raises(Corrupt, match="changes what cannot be changed"):
        open_foreign(str(tmp_path / "x.pt"))


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02K\x01r\xff\xff\xff\x7f.",
        b"\x80\x02\x8a\xff" + b"\xff" * 255 + b".",
        b"\x80\x02\x8b\x00\x00\x00\x40" + b"\x01" * 64,
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7fK\x01.",
        b"\x80\x04\x96\x00\x00\x00\x00\x00\x01\x00\x00.",
        b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x40\x85R.",
        b"\x80\x02I" + b"9" * 100_000 + b"\n.",
    ],
)
def test_a_few_bytes_do_not_make_it_take_gigabytes(data):
    script = (
        "from checkpoint.interop.formats.inert import load_inert;"
        "from checkpoint.errors import CheckpointError\n"
        f"try: load_inert({data!r}, 'x', {{}}, print)\n"
        "except CheckpointError: pass\n"
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
    )
    if data[2:3] == b"I":
        with pytest.raises(Corrupt):
            read(data)
        return
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(told.stdout) < 200_000, "kilobytes"


def test_cycles_and_repetitions_beyond_all_reason_are_refused():
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(Corrupt, match="beyond all reason"):
        read(pickle.dumps(cycle))
    node: Any = [1, 2]
    for _ in range(40):
        node = [node, node]
    with pytest.raises(Corrupt, match="beyond all reason"):
        read(pickle.dumps(node))
    with pytest.raises(Corrupt, match="beyond all reason"):
        read(b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b".")


def test_a_file_of_torch_save_with_cycles_is_refused_as_well(tmp_path):
    node: Any = {"weight": torch.ones(1)}
    for _ in range(40):
        node = {"a": node, "b": node}
    torch.save(node, tmp_path / "x.pt")
    with pytest.raises(Corrupt, match="beyond all reason"):
        open_foreign(str(tmp_path / "x.pt"))


def test_plain_data_come_through_as_they_are():
    state = {
        "a": [1, 2.5, None, True, "é", b"\x00\xff", 1 + 2j, -(2**70)],
        "b": (1, (2,)),
        3: {"x": {}},
        1.5: "float",
    }
    for protocol in (2, 3, 4, 5):
        assert read(pickle.dumps(state, protocol)) == state
    several = (OrderedDict(a=1), defaultdict(list, b=[1]), Counter("aab"), {1, 2}, bytearray(b"xy"))
    assert read(pickle.dumps(several)) == ({"a": 1}, {"b": [1]}, {"a": 2, "b": 1}, [1, 2], b"xy")


@pytest.mark.parametrize("code", ["?", "i1", "<u2", ">i4", "u8", "f2", "f4", ">f8", "c8", "c16"])
def test_numpy_s_numbers_become_python_s(code):
    number = np.dtype(code).type(1)
    back = read(pickle.dumps({"best": number, "kind": number.astype(code)}))
    assert back == {"best": 1, "kind": 1} and type(back["best"]) is type(number.item())
    swapped = np.array([3], ">i4")[0]
    assert read(pickle.dumps(swapped)) == 3


@pytest.mark.parametrize("value", [np.str_("a"), np.datetime64("2020-01-01"), np.longdouble(1)], ids=repr)
def test_other_scalars_of_numpy_stay_records(value):
    assert read(pickle.dumps(value))["class"] == "numpy.scalar"


def test_a_number_of_other_length_than_its_type_is_corrupt():
    short = pickle.dumps(np.float32(1.5), protocol=2).replace(b"f4", b"f8")
    with pytest.raises(Corrupt, match="a number of the type f8 that has 4 bytes"):
        read(short)


def test_objects_of_frameworks_become_records_that_name_their_class():
    found = read(pickle.dumps({"device": torch.device("cpu"), "dtype": torch.bfloat16, "path": Path("/a/b")}))
    assert found["device"]["class"] == "torch.device" and found["dtype"] == "bfloat16"
    assert found["path"]["class"] == "pathlib.PosixPath" and "a" in found["path"]["made_of"]


def test_the_walk_over_opcodes_knows_every_one_that_pickle_writes():
    value = [
        {"k" * 300: 1 << 40, "t": (1, 2, 3, 4), "b": b"x" * 300},
        {1},
        frozenset((2,)),
        1e300,
        "u" * 70000,
    ]
    for protocol in (2, 3, 4, 5):
        data = pickle.dumps(value, protocol)
        assert end_of_pickle(data + b"rest", 0, "x") == len(data)
        for stop in range(0, len(data), 97):
            assert end_of_pickle(data[:stop], 0, "x") is None
        assert [op.name for op, _, _ in pickletools.genops(data)][-1] == "STOP"


def test_only_the_names_that_are_listed_have_stand_ins():
    assert {name.partition(".")[0] for name in PLAIN} == {
        "collections",
        "builtins",
        "_codecs",
        "torch",
        "numpy",
    }


@pytest.mark.parametrize("name", ["tuple", "list", "set", "complex", "int", "dict"])
@pytest.mark.parametrize("state", [b"}U\x01xK\x01s", b"(N}U\x01xK\x01st", b"]K\x01a", b"K\x01"])
def test_no_state_gets_into_pythons_own_classes(name, state):
    with pytest.raises(Corrupt):
        read(b"\x80\x02cbuiltins\n" + name.encode() + b"\n" + state + b"b.")
    for append in (b"K\x01a", b"(K\x01e", b"K\x01K\x02s"):
        with pytest.raises(Corrupt):
            read(b"\x80\x02cbuiltins\n" + name.encode() + b"\n" + append + b".")
