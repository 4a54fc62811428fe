"""PyTorch's files that do not hold what torch.save writes: refused in one line, before a load."""

import pickle
import re
import zipfile
from collections import OrderedDict

import pytest
import torch

from wan22.checkpoints.files.weights import read_weights

CODE = "holds Python code beside its tensors; it is not run"
DAMAGED = "is cut off or damaged: "


class Storage:
    """Named by a pickle as torch.save names it: key, numbers, and the class that gives a number's size."""

    def __init__(self, key, count, kind="FloatStorage"):
        self.words = ("storage", getattr(torch, kind), key, "cpu", count)


class Tensor:
    def __init__(self, storage, size, stride, offset=0):
        self.arguments = (storage, offset, size, stride, False, OrderedDict())

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


class Pickler(pickle._Pickler):
    def persistent_id(self, value):
        return value.words if isinstance(value, Storage) else None


def write(path, state, records=(), compression=zipfile.ZIP_STORED):
    """Write PyTorch's zip format; `state` is pickled, or a pickle."""
    if not isinstance(state, bytes):
        with (path.parent / "pickle").open("wb") as file:
            Pickler(file, 2).dump(state)
        state = (path.parent / "pickle").read_bytes()
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in {"data.pkl": state, "version": b"3\n", **dict(records)}.items():
            archive.writestr(f"archive/{name}", content)


def refused(path, message):
    with pytest.raises(ValueError, match=message) as error:
        read_weights(path)
    text = str(error.value)
    assert text.startswith(str(path)) and "\n" not in text and len(text) < 600


NUMBERS = {"data/0": bytes(64)}  # sixteen of float32


def one(**given):
    """A table with one tensor over the record of sixteen numbers."""
    known = {"count": 16, "size": (4, 4), "stride": (4, 1), "offset": 0, "kind": "FloatStorage"} | given
    storage = Storage("0", known["count"], known["kind"])
    return {"a": Tensor(storage, known["size"], known["stride"], known["offset"])}


def test_what_torch_does_not_write_itself_is_read(tmp_path):
    write(tmp_path / "w.pth", one(), NUMBERS)
    assert torch.equal(read_weights(tmp_path / "w.pth").tensors["a"], torch.zeros(4, 4))


@pytest.mark.parametrize("new", [True, False], ids=["zip", "old"])
def test_every_way_in_which_tensors_are_saved(new, tmp_path):
    module = torch.nn.Linear(2, 3)
    wide = torch.arange(12.0).reshape(3, 4)
    state = OrderedDict(module.state_dict()) | {
        "parameter": module.weight,
        "transposed": wide.t(),
        "part": wide[1:, ::2],
        "expanded": wide[:1].expand(3, 4),
        "none": torch.empty(0, 3),
        "number": torch.tensor(3),
        **{str(d): wide.to(d) for d in (torch.bfloat16, torch.float16, torch.int8, torch.bool)},
    }
    if new:
        state["float8"] = wide.to(torch.float8_e4m3fn)
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=new)
    found = read_weights(tmp_path / "w.pth").tensors
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].float(), tensor.detach().float()), name


VIEWS = {
    "a record that is shorter": (one(count=64), "there are 64 of 256 bytes"),
    "a record that would not fit": (one(count=10**13), "there are 64 of 40000000000000 bytes"),
    "wider numbers": (one(kind="DoubleStorage"), "there are 64 of 128 bytes"),
    "sizes beyond": (one(size=(4, 64), stride=(64, 1)), "reaches beyond its 64 bytes"),
    "huge sizes": (one(size=(10**9, 10**9)), "reaches beyond"),
    "an offset beyond": (one(offset=1), "reaches beyond"),
    "a negative size": (one(size=(-1, 4)), "which are no sizes"),
    "a negative stride": (one(stride=(-4, 1)), "which are no sizes"),
    "texts": (one(size=("4", "4")), "which are no sizes"),
    "other axes": (one(stride=(1,)), "2 axes and 1 strides"),
    "numbers repeated": (one(count=1, size=(10**5, 10**5), stride=(0, 0)), "again and again"),
}


@pytest.mark.parametrize("what", VIEWS)
def test_tensors_that_are_not_in_the_file(what, tmp_path):
    state, message = VIEWS[what]
    write(tmp_path / "w.pth", state, NUMBERS)
    refused(tmp_path / "w.pth", rf"w\.pth {DAMAGED}.*{message}")


def nested(levels):
    """Tuples of which each has the one before twice: short to write, endless to print or to hash."""
    text = b"\x80\x02)q\x00"
    for level in range(levels):
        text += b"h" + bytes([level]) + b"h" + bytes([level]) + b"\x86q" + bytes([level + 1])
    return text


PICKLES = {
    "a table in itself": (b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.", "holds 'a', which is no tensor"),
    "a list in itself": (b"\x80\x02]q\x00h\x00a.", "holds a list"),
    "nothing to pop": (b"\x80\x020.", CODE),
    "an empty stack": (b"\x80\x02.", DAMAGED),
    "an unknown memo": (b"\x80\x02h\x05.", DAMAGED),
    "no end": (b"\x80\x02}", DAMAGED),
    "a text of 2 GB": (b"\x80\x02X\xff\xff\xff\x7fabc.", DAMAGED),
    "no UTF-8": (b"\x80\x02X\x02\x00\x00\x00\xff\xfe.", DAMAGED),
    "half a number": (b"\x80\x02G\x00\x00.", DAMAGED),
    "a key that cannot be hashed": (b"\x80\x02}]K\x01s.", "which is no tensor"),
    "a key that takes for ever": (nested(60) + b"}h\x3cK\x01s.", "which is no tensor"),
    "a call that takes for ever": (nested(60) + b")R.", CODE),
    "a protocol of the future": (b"\x80\x63}.", DAMAGED),
    "no record of numbers": (b"\x80\x02)Q.", DAMAGED),
    "a mark": (b"\x80\x02(.", DAMAGED),
    "too few for a tuple": (b"\x80\x02\x85.", DAMAGED),
    "a memory of 8 GB": (b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\x00\x50\xd6\xdc\x01\x85R.", CODE),
    "a tensor of 8 GB": (b"\x80\x02ctorch\nTensor\n\x8a\x05\x00\x94\x35\x77\x00\x85R.", CODE),
    "code": (b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00truetR.", DAMAGED + "|" + CODE),
    "an instance": (b"(S'true'\nios\nsystem\n.", DAMAGED + "|" + CODE),
}


@pytest.mark.parametrize("what", PICKLES)
def test_pickles_that_are_no_table_of_tensors(what, tmp_path):
    text, message = PICKLES[what]
    write(tmp_path / "w.pth", text)
    refused(tmp_path / "w.pth", message)
    if text.startswith(b"\x80"):
        (tmp_path / "w.pth").write_bytes(text)  # as the first of the old format
        refused(tmp_path / "w.pth", f"{DAMAGED}|{CODE}")


OTHERS = {
    "a tensor": torch.ones(3),
    "sparse": {"a": torch.eye(3).to_sparse()},
    "without values": {"a": torch.zeros(3, device="meta")},
}


@pytest.mark.parametrize("new", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("what", OTHERS)
def test_what_is_no_ordinary_tensor(what, new, tmp_path):
    torch.save(OTHERS[what], tmp_path / "w.pth", _use_new_zipfile_serialization=new)
    refused(tmp_path / "w.pth", rf"{CODE}.*torch|a Tensor, not a table")


def test_records_that_torch_does_not_write(tmp_path):
    path = tmp_path / "w.pth"
    write(path, one(), NUMBERS, zipfile.ZIP_DEFLATED)
    refused(path, "its records are compressed")
    write(path, one(), {})
    refused(path, "of a there are 0 of 64 bytes")
    write(path, one(), {**NUMBERS, "byteorder": b"abc"})
    refused(path, re.escape(DAMAGED) + ".*abc")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/readme.txt", "hello")
    refused(path, r"0 records data\.pkl")


def test_an_old_file_that_ends_in_its_numbers(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"a": torch.ones(64), "b": torch.ones(64)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-100])
    refused(path, r"of b there are 0 of 256 bytes")
