import hashlib
import json

import pytest
import torch

from sepme_diffusers import Increment
from sepme_diffusers.bank.rows import as_rows, digest, from_rows

MODULES = ("mid.attn2.to_k", "mid.attn2.to_v")


def increments() -> dict[str, Increment]:
    torch.manual_seed(0)
    pooled = Increment(torch.randn(3, 6), B=torch.randn(6, 3), gate=0.5)
    c = {name: torch.randn(4, 2) for name in MODULES}
    a, b = torch.randn(2, 8), torch.randn(8, 2)
    return {
        "text": Increment(a, B=b),
        "gated": Increment(a, B=b, gate=0.25),
        "two doors": Increment(a, B=b, doors={"pooled": pooled}),
        "module": Increment(a, C=c, gate=1.5),
        "module at two doors": Increment(a, C=c, doors={"pooled": pooled}),
        "compact": Increment(a, C=c, doors={"pooled": pooled}).compact(),
        "wide": Increment(a.double(), B=b.bfloat16()),
    }


def gates_of(increment: Increment) -> dict[str, float]:
    parts = {"tokens": increment, **increment.doors}
    return {door: part.gate for door, part in parts.items() if part.gate is not None}


@pytest.mark.parametrize("name", increments())
def test_rows_and_back_is_exact(name):
    increment = increments()[name]
    rows = as_rows(increment)
    back = from_rows(rows, gates_of(increment))
    assert back.tensors().keys() == increment.tensors().keys()
    for key, tensor in increment.tensors().items():
        assert tensor.dtype == back.tensors()[key].dtype
        assert torch.equal(tensor, back.tensors()[key])
    assert gates_of(back) == gates_of(increment)
    ranks = {"tokens": increment.rank, **{door: part.rank for door, part in increment.doors.items()}}
    assert all(len(tensor) == ranks[name.split(".")[0]] for name, tensor in rows.items())
    assert list(rows) == sorted(rows)


def test_the_digest_is_of_header_and_bytes_as_the_format_says():
    increment = increments()["two doors"]
    rows = as_rows(increment)
    shapes = {"pooled.A": [3, 6], "pooled.B": [3, 6], "tokens.A": [2, 8], "tokens.B": [2, 8]}
    header = json.dumps([[name, "F32", shape] for name, shape in shapes.items()], separators=(",", ":"))
    numbers = b"".join(rows[name].numpy().tobytes() for name in shapes)
    assert digest(rows) == hashlib.sha256(header.encode() + numbers).hexdigest()


def test_every_number_type_and_name_counts():
    rows = as_rows(increments()["text"])
    changed = rows["tokens.B"].clone()
    changed[1, 7] = torch.nextafter(changed[1, 7], torch.tensor(9.0))
    others = [
        rows,
        {**rows, "tokens.B": changed},
        {**rows, "tokens.B": rows["tokens.B"].double()},
        {"tokens.A": rows["tokens.A"], "tokens.C.x": rows["tokens.B"]},
        {"tokens.A": rows["tokens.A"].view(4, 4), "tokens.B": rows["tokens.B"]},
        {name: rows[other] for name, other in zip(rows, reversed(rows), strict=True)},
    ]
    assert len(set(map(digest, others))) == len(others)
    assert digest(dict(reversed(rows.items()))) == digest(rows)


@pytest.mark.parametrize(
    "names",
    [(), ("tokens.A",), ("tokens.B",), ("pooled.A", "pooled.B"), ("tokens.A", "tokens.B", "pooled.A"),
     ("tokens.A", "tokens.B", "tokens.C.x"), ("tokens.A", "tokens.B", "x"), ("tokens.A", "tokens.B", "tokens.x.A"),
     ("A", "B")],
)  # fmt: skip
def test_what_is_no_increment_is_refused(names):
    with pytest.raises(ValueError, match="these tensors are not an increment's"):
        from_rows({name: torch.ones(1, 4) for name in names}, {})


def test_a_gate_at_a_door_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"gates for the doors \['pooled'\]"):
        from_rows(as_rows(increments()["text"]), {"pooled": 1.0})
