"""Where the weights stand in a checkpoint, and what else does."""

import time

import numpy as np
import pytest
from official_states import DISCRIMINATOR, TRANSFORMER, rqvae_config

from rq_jax.interop import official

T = np.zeros(2, np.float32)
EXPECTED = {"encoder.conv_in.weight", "encoder.down.0.block.1.bias", "pos_emb"}
STATE = {name: T for name in EXPECTED}


def pick(content, **options):
    """State, place, and what is left out."""
    leaves = official.leaves_of(content)
    weights = official.pick_weights(leaves, EXPECTED, **options)
    return weights.state.keys(), weights.place, official.name_left_out(leaves, weights.used)


def prefixed(prefix, state=STATE):
    return {f"{prefix}{name}": value for name, value in state.items()}


def test_find_kind():
    gan = {"gan": {"disc": {"arch": DISCRIMINATOR}}}
    vqgan = {"model": {"params": {}}}
    for config, kind in (
        (rqvae_config(), "rqvae"),
        ({"arch": rqvae_config() | {"type": "RQ-VAE"}, **gan}, "rqvae"),
        ({"arch": TRANSFORMER}, "rqtransformer"),
        (gan, "discriminator"),
        (vqgan, "vqgan"),
    ):
        assert official.find_kind(config) == kind
    with pytest.raises(ValueError, match="arch.type: 'dalle' is unknown; allowed are rq-vae, rq-transformer"):
        official.find_kind({"arch": {"type": "dalle"}})
    with pytest.raises(ValueError, match=r"arch.type: 'x\\nnext: \\x1b' is unknown"):
        official.find_kind({"arch": {"type": "x\nnext: \x1b"}})
    with pytest.raises(ValueError, match="config: has neither arch.type, nor gan.disc.arch, nor model.params; give"):
        official.find_kind({"optimizer": {}})


PARTS = {name.split(".")[0]: {} for name in EXPECTED if "." in name}
for name in EXPECTED - {"pos_emb"}:
    PARTS["encoder"][name.removeprefix("encoder.")] = T


@pytest.mark.parametrize(
    "content, place",
    [
        (STATE, ""),
        (STATE | {"epoch": 3, "hparams": {"a": 1}}, ""),
        *(({key: STATE, "epoch": 3}, key) for key in ("model", "model_state_dict", "params", "net", "ema", "弐", "a.b")),
        ({"checkpoint": {"weights": STATE, "step": 3}, "epoch": 4}, "checkpoint.weights"),
        ([STATE, {"lr": 0.1}], "0"),
        (prefixed("module."), "module"),
        ({"state_dict": prefixed("_orig_mod.module.")}, "state_dict._orig_mod.module"),
        ({"state_dict": prefixed("first_stage_model.") | prefixed("model.diffusion.", {"out": T})}, "state_dict.first_stage_model"),
        ({"_fsdp_wrapped_module.pos_emb": T, "_fsdp_wrapped_module.encoder._fsdp_wrapped_module.conv_in.weight": T,
          "_fsdp_wrapped_module.encoder.down.0._checkpoint_wrapped_module.block.1.bias": T}, "_fsdp_wrapped_module"),
        (PARTS | {"pos_emb": T}, ""),
        ({"model": STATE, "model_ema": STATE | {}}, "model"),
        ({"a": STATE, "b": {"encoder.conv_in.weight": T}}, "a"),
    ],
)  # fmt: skip
def test_weights_are_found_by_their_names_wherever_they_stand(content, place):
    names, found, _ = pick(content)
    assert (names, found) == (EXPECTED, place)


def test_a_dict_that_stands_twice_is_no_choice():
    assert pick({"model": STATE, "best": STATE})[:2] == (EXPECTED, "model")


def test_averaged_weights():
    both = {"state_dict": STATE, "state_dict_ema": prefixed("module.")}
    assert pick(both)[1:] == ("state_dict", ["state_dict_ema"])
    assert pick(both, use_ema=True)[1:] == ("state_dict_ema.module", ["state_dict"])
    assert pick({"net": prefixed("") | prefixed("EMA.")}, use_ema=True)[1] == "net.EMA"
    with pytest.raises(ValueError, match="state: has no averaged weights, it has 'schema', 'epoch'; leave out --ema"):
        pick({"schema": STATE, "epoch": 1}, use_ema=True)


def test_weights_that_stand_in_several_places_are_told_apart_by_key():
    content = {"student": prefixed("module."), "teacher": {"net": {name: T.copy() for name in EXPECTED}}, "epoch": 1}
    with pytest.raises(ValueError, match="weights that fit stand under 'student.module', 'teacher.net'; choose one by"):
        pick(content)
    for key, place in (("student", "student.module"), ("teacher", "teacher.net"), ("teacher.net", "teacher.net")):
        assert pick(content, key=key)[1] == place
    for key in ("nowhere", "stud", "epoch"):
        with pytest.raises(ValueError, match=f"--key: no tensors stand below '{key}'; the file has 'student', 'teach"):
            pick(content, key=key)


def test_what_is_left_out_is_named():
    content = {
        "state_dict": prefixed("model.") | {"loss.vgg.a": T, "loss.vgg.b": T, "logit": T, "model.step": 3},
        "optimizer": {"state": {0: {"exp_avg": T}}, "groups": [1, 2]},
        "epoch": 3,
        7: {"x": T},
    }
    left_out = ["state_dict.loss.* (2 tensors)", "state_dict.logit", "state_dict.model.step", "optimizer", "epoch", "7"]
    assert pick(content)[2] == left_out


def test_tensors_beside_the_weights_are_not_passed_over():
    assert pick(STATE | {"extra": T})[0] == {*EXPECTED, "extra"}
    assert pick({"a": prefixed("net.") | {"net.x.y": T, "other.z": T}})[0] == {*EXPECTED, "x.y"}
    # What fits only without one of its parts is second to what fits as it stands; what ends otherwise does not fit.
    assert pick(STATE | {"encoder.lora.conv_in.weight": T})[0] == {*EXPECTED, "encoder.lora.conv_in.weight"}
    assert pick(STATE | {"pos_emb.original": T})[0] == {*EXPECTED, "pos_emb.original"}


def test_what_fits_nothing_is_the_largest_dict():
    content = {"model": {"a": T, "b": T, "n": 1}, "other": {"c": T}}
    assert pick(content) == ({"a", "b"}, "model", ["model", "other"])


class Opaque:
    """As the reader of files makes them."""

    def __str__(self):
        return "lightning.Trainer"


def test_what_cannot_be_read_is_dropped_or_named_but_never_weights():
    assert pick(STATE | {"trainer": Opaque()})[::2] == (EXPECTED, ["trainer"])
    assert pick({"state": STATE, "model": Opaque()})[::2] == (EXPECTED, ["model"])
    weights = official.pick_weights(official.leaves_of(STATE | {"pos_emb": Opaque()}), EXPECTED)
    table = official.Table([], {name: np.zeros(2, np.int64) for name in EXPECTED})
    with pytest.raises(ValueError, match="pos_emb is 'lightning.Trainer', which is not read as a tensor"):
        official.rules.import_state(weights.state, table)


@pytest.mark.parametrize(
    "content", [{}, [], 3, "x", None, T, {"a": {}}, {"state_dict": None}, Opaque(), {"a": Opaque()}]
)
def test_content_without_tensors_by_name(content):
    held = ", but 'lightning.Trainer'" if "Opaque" in repr(content) else ", but '.*'" if content is T else ""
    with pytest.raises(ValueError, match=f"^state: holds no tensors by name{held}; give a file with the model's state"):
        official.leaves_of(content)


def test_a_gumbel_quantizer_is_refused():
    with pytest.raises(ValueError, match="quantize.proj.weight: this is a Gumbel quantizer"):
        pick({"state_dict": {"quantize.proj.weight": T}})


def test_names_of_any_length_cost_no_more_than_their_length():
    deep, long, wide = "module." * 10**6, "x" * 10**7, {f"a{i}.pos_emb": T for i in range(10_000)}
    content = {long: wide, deep: {deep: {deep: T}}, "state": STATE | {f"{deep}pos_emb": T, f"{long}.pos_emb": T}}
    begin = time.process_time()
    with pytest.raises(ValueError, match="--key"):
        pick(content, key=deep)
    names, place, left_out = pick(content)
    assert time.process_time() - begin < 2  # meant is a tenth
    assert EXPECTED < names and place == "state" and max(map(len, left_out)) < 2000


def test_as_many_places_as_tensors_cost_no_more_than_their_number():
    begin = time.process_time()
    names, place, left_out = pick({f"a{i}.encoder.conv_in.weight": T.copy() for i in range(20_000)})
    assert time.process_time() - begin < 4  # meant is a tenth
    assert (names, place, len(left_out)) == ({"encoder.conv_in.weight"}, "a0", 19_999)
