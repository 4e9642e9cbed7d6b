"""Stamps of protocols: what decides whether figures are set side by side, and what records keep of it."""

import json

import pytest

from rq_jax.evaluation import stamps
from rq_jax.evaluation.stamps import Figure

FIELDS = {
    "data": "twemoji", "split": "validation", "images": 447, "ids": "a1", "crop": "resize_center_crop",
    "resize": "Pillow, bilinear, antialiased", "size": [64, 64], "channels": 3, "range": "[-1, 1]",
    "clipping": "to [-1, 1]", "rounding": "none", "grey": "three equal channels", "extractor": "efficientnet_lite0",
    "extractor weights": "b2", "extractor resize": "bicubic", "estimator": "unbiased", "subset_size": 223, "seed": 0,
    "conditions": "c3", "paired": False,
}  # fmt: skip


def record_of(of, fields=FIELDS, psnr=(20.0, 25.0), **more):
    record = {"results": {of: {"psnr": list(psnr)}}, "kernel_distance": {"of": {of: {"mean": 0.5, "std": 0.25}}}}
    figures = [
        Figure("psnr", of, ("results", of, "psnr"), {"estimator": "dB"}),
        Figure("kernel_distance", of, ("kernel_distance", "of", of), fields),
    ]
    stamps.attach(record, figures, {of: {"checkpoint": of, "step": 3}})
    return json.loads(json.dumps({**record, **more}))


def test_a_stamp_is_that_of_the_fields_whatever_their_order():
    assert stamps.stamp_of(FIELDS) == stamps.stamp_of(dict(reversed(FIELDS.items())))
    assert len(stamps.stamp_of(FIELDS)) == 8
    assert stamps.stamp_of(FIELDS) == stamps.stamp_of(json.loads(json.dumps(FIELDS)))


def test_figures_are_read_back_with_their_stamps():
    found = stamps.read(record_of("a"), "a.json")
    assert found == [
        ("psnr", "a", [20.0, 25.0], stamps.stamp_of({"estimator": "dB"})),
        ("kernel_distance", "a", {"mean": 0.5, "std": 0.25}, stamps.stamp_of(FIELDS)),
    ]


def test_a_table_has_a_stamp_beside_each_figure():
    lines = stamps.table(stamps.read(record_of("runs/a"), "a.json")).splitlines()
    assert [line.split() for line in lines] == [
        ["runs/a", "1", "2", "all", "protocol"],
        ["psnr", "20", "25", stamps.stamp_of({"estimator": "dB"})],
        ["kernel_distance", "0.5", "±", "0.25", stamps.stamp_of(FIELDS)],
    ]


def test_records_of_one_protocol_are_set_side_by_side():
    """What was measured, when and by which versions plays no part."""
    a, b = record_of("a", environment={"commit": "x"}), record_of("b", psnr=(21.0, 26.0), environment={"commit": "y"})
    found = stamps.compare(a, b, ("a.json", "b.json"))
    assert found.unlike == {}
    assert [line.split() for line in found.table("ab").splitlines()] == [
        ["a:", "a", "b:", "b", "protocol"],
        ["psnr", "25", "26", stamps.stamp_of({"estimator": "dB"})],
        ["kernel_distance", "0.5", "±", "0.25", "0.5", "±", "0.25", stamps.stamp_of(FIELDS)],
    ]


@pytest.mark.parametrize("name", FIELDS)
def test_each_field_in_turn_is_refused_by_its_name(name):
    other = {**FIELDS, name: "another"}
    found = stamps.compare(record_of("a"), record_of("b", other), ("a.json", "b.json"))
    assert [row[0] for row in found.rows] == ["psnr"]  # which is alike in both
    shown = f"'{FIELDS[name]}'" if isinstance(FIELDS[name], str) else json.dumps(FIELDS[name])
    assert found.unlike == {"kernel_distance": [f"{name} {shown} against 'another'"]}
    assert stamps.refusal(found.unlike) == (
        f"protocols: unlike of kernel_distance: {name} {shown} against 'another'; measure both alike"
    )


def test_a_field_that_one_protocol_lacks_is_unlike():
    assert stamps.differences({"seed": 1}, {}) == ["seed 1 against unset"]


def test_figures_that_differ_alike_share_a_clause():
    unlike = {"psnr": ["images 2 against 3"], "ssim": ["images 2 against 3"], "IS": ["seed 0 against 1"]}
    assert stamps.refusal(unlike) == (
        "protocols: unlike of psnr, ssim: images 2 against 3; IS: seed 0 against 1; measure both alike"
    )


def test_a_table_has_one_protocol_a_figure():
    a, b, other = record_of("a"), record_of("b"), record_of("c", {**FIELDS, "images": 3})
    protocols = {**a["protocols"], **other["protocols"]}
    alike = stamps.check_alike([*stamps.read(a, "a"), *stamps.read(b, "b")], protocols)
    assert alike == {"psnr": stamps.stamp_of({"estimator": "dB"}), "kernel_distance": stamps.stamp_of(FIELDS)}
    with pytest.raises(ValueError, match="^protocols: unlike of kernel_distance: images 447 against 3; measure both"):
        stamps.check_alike([*stamps.read(a, "a"), *stamps.read(other, "c")], protocols)


def without(record, *keys):
    return {name: value for name, value in record.items() if name not in keys}


@pytest.mark.parametrize(
    "broken",
    [
        without(record_of("a"), "figures"),
        without(record_of("a"), "protocols"),
        without(record_of("a"), "results"),
        {**record_of("a"), "figures": [{"figure": "psnr"}]},
        {**record_of("a"), "figures": 3},
        {**record_of("a"), "protocols": {stamp: {} for stamp in record_of("a")["protocols"]}},  # changed by hand
    ],
)
def test_other_records_are_refused(broken):
    with pytest.raises(ValueError, match="^'b.json' is no record of evaluate.py with its protocols; measure again$"):
        stamps.compare(record_of("a"), broken, ("a.json", "b.json"))


def test_records_without_a_common_figure_are_refused():
    other = {"nats": 3.0}
    stamps.attach(other, [Figure("nats", "b", ("nats",), {})], {})
    with pytest.raises(ValueError, match="^protocols: 'a.json' and 'b.json' have no figure in common$"):
        stamps.compare(record_of("a"), other, ("a.json", "b.json"))
