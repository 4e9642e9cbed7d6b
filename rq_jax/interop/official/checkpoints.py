"""The parts of official checkpoint files: the kind of model, its state dict, its discriminator, and the rest."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from rq_jax.interop.official.settings import discriminator_section, is_vqgan

_KINDS = {"rq-vae": "rqvae", "rq-transformer": "rqtransformer"}
_DISCRIMINATOR, _VQGAN_DISCRIMINATOR = "discriminator", "loss.discriminator."


class Checkpoint(NamedTuple):
    """The parts of a checkpoint file.

    Attributes:
      state: tensors of the model by official name.
      discriminator: those of the discriminator beside it, or None.
      dropped: names of the parts that are left out on purpose: optimizers, schedules, counters, the perceptual term.
    """

    state: Mapping[str, Any]
    discriminator: Mapping[str, Any] | None
    dropped: list[str]


def find_kind(config: Mapping[str, Any]) -> str:
    """The kind of model of an official config: "rqvae", "rqtransformer", "discriminator" or "vqgan".

    Raises:
      ValueError: something else.
    """
    if is_vqgan(config):
        return "vqgan"
    arch = config.get("arch", config)
    if isinstance(arch, Mapping) and "type" in arch:
        kind = str(arch["type"]).lower()
        if kind not in _KINDS:
            raise ValueError(f"arch.type: '{arch['type']}' is unknown; allowed are {', '.join(_KINDS)}")
        return _KINDS[kind]
    if discriminator_section(config) is not None:
        return _DISCRIMINATOR
    raise ValueError(
        "config: has neither arch.type, nor gan.disc.arch, nor model.params; give the yaml that came with the weights"
    )


def unpack(file: Any, kind: str, use_ema: bool = False) -> Checkpoint:
    """The state dicts in the content of a checkpoint file.

    Args:
      file: a state dict, or a dict with one under "state_dict", beside "discriminator", "optimizer" and the like.
      kind: from `find_kind`.
      use_ema: take the averaged weights, under "state_dict_ema".

    Raises:
      ValueError: there is no such state dict, or it is of a quantizer that we do not have.
    """
    if not isinstance(file, Mapping):
        raise ValueError(f"state: holds a {type(file).__name__}, not tensors by name; give a checkpoint")
    name = "state_dict_ema" if use_ema else "state_dict"
    if kind == _DISCRIMINATOR and isinstance(file.get(_DISCRIMINATOR), Mapping):
        name = _DISCRIMINATOR
    if name in file:
        state, discriminator = file[name], file.get(_DISCRIMINATOR) if name != _DISCRIMINATOR else None
        dropped = [str(key) for key in file if key not in (name, _DISCRIMINATOR)]
    elif use_ema or "state_dict_ema" in file:
        hint = "leave out --ema" if use_ema else "add --ema for state_dict_ema"
        raise ValueError(f"state: has no {name}, it has {', '.join(map(str, list(file)[:8]))}; {hint}")
    else:
        state, discriminator, dropped = file, None, []
    state = _without_prefix(state)
    if kind == "vqgan":
        return _split_vqgan(state, dropped)
    return Checkpoint(state, None if discriminator is None else _without_prefix(discriminator), dropped)


def _without_prefix(state: Any) -> dict[str, Any]:
    """The state dict without the prefix "module." of torch's wrappers for several devices."""
    if not isinstance(state, Mapping) or not state:
        raise ValueError("state: its state dict is empty or none; give a checkpoint")
    state = {str(name): tensor for name, tensor in state.items()}
    while all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


def _split_vqgan(state: dict[str, Any], dropped: list[str]) -> Checkpoint:
    """VQGAN's state dict holds its losses too, with the discriminator and the perceptual network in them."""
    if "quantize.proj.weight" in state:
        raise ValueError("quantize.proj.weight: this is a Gumbel quantizer, which we do not have; allowed is VQModel")
    model: dict[str, Any] = {}
    discriminator: dict[str, Any] = {}
    losses: dict[str, int] = {}
    for name, tensor in state.items():
        if name.startswith(_VQGAN_DISCRIMINATOR):
            discriminator[name.removeprefix(_VQGAN_DISCRIMINATOR)] = tensor
        elif name.startswith("loss.") or name == "colorize":  # `colorize` paints segmentations for the log
            group = ".".join(name.split(".")[:2])
            losses[group] = losses.get(group, 0) + 1
        else:
            model[name] = tensor
    dropped = dropped + [f"{group}.* ({count} tensors)" if count > 1 else group for group, count in losses.items()]
    return Checkpoint(model, discriminator or None, dropped)
