"""An official checkpoint becomes a model directory of ours."""

import contextlib
import functools
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from rq_jax import checkpoint, models
from rq_jax.files import local_path
from rq_jax.interop import official, state_file
from rq_jax.interop.thresholds import entropy_settings
from rq_jax.settings import checks
from rq_jax.settings.text import quoted

DISCRIMINATOR, TOKENIZER = "discriminator", "tokenizer"

logger = logging.getLogger(__name__)


class Converted(NamedTuple):
    """One model of ours and what it was made of.

    Attributes:
      config: of the model directory.
      variables: of the model.
      num_tensors: number of official tensors that were read.
      place: what stands before their names in the file; "" for nothing.
      dropped: names of those that nothing reads.
    """

    config: dict[str, Any]
    variables: dict[str, Any]
    num_tensors: int
    place: str
    dropped: list[str]


class Conversion(NamedTuple):
    """A checkpoint that was converted.

    Attributes:
      kind: of the checkpoint, see `official.find_kind`.
      models: by directory below the output, "." for the main one.
      dropped: names of the parts of the file that were left out.
      unopened: names of the classes whose objects were not opened.
    """

    kind: str
    models: dict[str, Converted]
    dropped: list[str]
    unopened: list[str]


Routing = Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]


class _Pair(NamedTuple):
    """Settings of a transformer that goes with a tokenizer, further sections of its config, and the codebook."""

    settings: dict[str, Any]
    sections: dict[str, Any]
    codebook: Any


def convert_checkpoint(
    config: str | os.PathLike[str],
    state: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tokenizer: str | None = None,
    text_tokenizer: str | None = None,
    thresholds: str | None = None,
    entropy_bins: str | None = None,
    use_ema: bool = False,
    key: str | None = None,
) -> Conversion:
    """Convert an official checkpoint to a model directory.

    Args:
      config: official config file, YAML or JSON.
      state: official weights, see `state_file.read_state`.
      out: new directory; the discriminator beside a tokenizer goes into discriminator/ below it.
      tokenizer: directory of the tokenizer of a transformer, converted or trained here; it is copied into `out`. None
        takes that of the same file, where there is one.
      text_tokenizer: vocabulary file of a model of text; it is copied into `out`.
      thresholds, entropy_bins: of a DQ-VAE whose router goes by entropy, see `thresholds.entropy_settings`.
      use_ema: take the averaged weights, such as those under "state_dict_ema".
      key: where the weights stand in the file, such as "generator.ema"; needed where several fit.

    Raises:
      ValueError, FileNotFoundError: files that are missing, damaged, or do not fit together; nothing is left behind.
    """
    official_config = state_file.read_config(config)
    kind = official.find_kind(official_config)
    _check_flags(kind, tokenizer, text_tokenizer, thresholds or entropy_bins)
    routing = functools.partial(entropy_settings, os.path.dirname(config), thresholds, entropy_bins)
    with _new_directory(out) as partial:
        # The configs are checked before the weights are read.
        pair = _bind_tokenizer(partial, kind, official_config, tokenizer, text_tokenizer) if tokenizer else None
        settings = pair.settings if pair else official.KINDS[kind].settings(official_config)
        if kind == "dqvae":
            settings |= routing(official_config, settings)
        models.create(official.KINDS[kind].model, **settings)
        content = state_file.read_state(state)
        leaves, table = official.leaves_of(content), official.KINDS[kind].table(settings)
        weights = official.pick_weights(leaves, table.names(), use_ema=use_ema, key=key)
        converted, used = {".": _convert(kind, settings, table, weights)}, weights.used
        for name, part, settings, table, weights in _beside(leaves, kind, official_config, routing, pair):
            converted[name] = _convert(part, settings, table, weights)
            used = used + weights.used
        if official.KINDS[kind].tokenizer:
            if (thresholds or entropy_bins) and TOKENIZER not in converted:
                _refuse_routing(thresholds or entropy_bins)
            _complete(converted["."], pair or _pair_of(converted.get(TOKENIZER)))
        for name, model in converted.items():
            checkpoint.save_model(partial / name, model.config, model.variables)
    return Conversion(kind, converted, official.name_left_out(leaves, used), _unopened(content))


def _check_flags(kind: str, tokenizer: str | None, text_tokenizer: str | None, routing: str | None) -> None:
    for name, value in (("tokenizer", tokenizer), ("text_tokenizer", text_tokenizer)):
        if value and not official.KINDS[kind].tokenizer:
            raise ValueError(f"--{name}: {value} is for stage 2, and this is a config of '{kind}'")
    if text_tokenizer and not tokenizer:
        raise ValueError(f"--text_tokenizer: {text_tokenizer} needs --tokenizer beside it; give both")
    if routing and (kind not in ("dqvae", "dqtransformer") or tokenizer):
        _refuse_routing(routing)


def _refuse_routing(value: str | None) -> None:
    raise ValueError(
        f"--thresholds, --entropy_bins: {value} is for the router of a DQ-VAE, and none is converted here; leave it out"
    )


def _beside(
    leaves: list[official.Leaf], kind: str, config: Mapping[str, Any], routing: Routing, pair: _Pair | None
) -> Iterator[tuple[str, str, dict[str, Any], official.Table, official.Weights]]:
    """What stands beside the main model: directory, kind, settings, table and weights of each."""
    if official.KINDS[kind].tokenizer:
        if pair is None and (first_stage := official.first_stage(config)):
            settings = official.dqvae_settings(first_stage)
            official.dqtransformer_settings(config, settings)  # they fit together
            table = official.dqvae_table(settings)
            found = official.find_weights(leaves, table.names())
            # A few names are those of any convolutional network.
            if len(found) == 1 and 2 * len(found[0].used) > len(table.names()):
                yield TOKENIZER, "dqvae", settings | routing(first_stage, settings), table, found[0]
    elif kind != DISCRIMINATOR and official.has_discriminator(config):
        for row in _find_discriminator(leaves, config):
            yield (DISCRIMINATOR, DISCRIMINATOR, *row)


def _find_discriminator(leaves: list[official.Leaf], config: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    """Settings, table and weights of the discriminator beside a tokenizer, where there is exactly one."""
    if official.holds_discriminator(leaves):
        settings = official.discriminator_settings(config)
        table = official.discriminator_table(settings)
        found = official.find_weights(leaves, table.names())
        if len(found) == 1:
            yield settings, table, found[0]


def _convert(kind: str, settings: dict[str, Any], table: official.Table, weights: official.Weights) -> Converted:
    """Config and variables of one model; a ValueError for weights that do not fit the settings."""
    name, state = official.KINDS[kind].model, weights.state
    dropped = [tensor for tensor in table.dropped() if tensor in state]
    try:
        variables = official.KINDS[kind].variables(state, settings)
    except ValueError as error:
        raise ValueError(f"state: {quoted(weights.place)}: {error}" if weights.place else str(error)) from None
    config = {"model": {"name": name, **settings}}
    return Converted(config, variables, len(table.official_shapes()), weights.place, dropped)


def _unopened(content: Any) -> list[str]:
    """Names of the classes of all opaque values, wherever they stand."""
    names: dict[str, None] = {}
    stack = [content]
    while stack:
        value = stack.pop()
        if isinstance(value, Mapping):
            stack += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            stack += value
        elif isinstance(value, state_file.Opaque):
            names[value.name] = None
    return sorted(names)


def report(conversion: Conversion, out: str | os.PathLike[str]) -> list[str]:
    """Lines about what was read, left out and written to `out`."""
    lines, dropped = [], list(conversion.dropped)
    for name, model in conversion.models.items():
        sizes = {part: sum(leaf.size for leaf in jax.tree.leaves(tree)) for part, tree in model.variables.items()}
        more = "".join(f", {part} {size:,}" for part, size in sizes.items() if part != "params")
        place = f" under {quoted(model.place)}" if model.place else ""
        kind = model.config["model"]["name"]
        lines.append(
            f"{kind}: {model.num_tensors} tensors{place}, {sizes['params']:,} parameters{more}; fingerprint "
            f"{checkpoint.fingerprint(model.variables)}; written to {Path(out) / name}"
        )
        dropped += [tensor if name == "." else f"{name}.{tensor}" for tensor in model.dropped]
    lines.append(f"left out: {official.listed([quoted(name) for name in dropped]) or 'nothing'}")
    if conversion.unopened:
        lines.append(f"not opened: objects of {official.listed([quoted(name) for name in conversion.unopened])}")
    return lines


@contextlib.contextmanager
def _new_directory(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A directory that becomes `out` in the end, and is removed where anything fails before."""
    out = local_path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out: '{out}' is there already; give the name of a new directory")
    parent = next(parent for parent in out.parents if parent.is_dir())
    partial = parent / f".{out.name}.{secrets.token_hex(8)}.partial"
    partial.mkdir()
    try:
        yield partial
        out.parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _bind_tokenizer(directory: Path, kind: str, config: Mapping[str, Any], path: str, text_path: str | None) -> _Pair:
    """Put the tokenizer, and the text tokenizer where there is one, into a stage-2 directory."""
    tokenizer = checkpoint.load_tokenizer(path)
    tokenizer_settings = models.settings_of(tokenizer.model)
    name, needed = tokenizer_settings["name"], official.KINDS[kind].tokenizer
    if name != needed:
        raise ValueError(f"--tokenizer: '{path}' is a model '{name}'; this transformer is over codes of '{needed}'")
    settings = official.KINDS[kind].settings(config, tokenizer_settings)
    if text_path:
        _copy_text_tokenizer(text_path, settings, directory)
    checkpoint.bind_tokenizer(directory, tokenizer)
    sample = official.sample_settings(config)
    for name, value in sample.items():
        checks.one_per_depth(f"sampling.{name}", value, settings["code_shape"][-1])
    sections = {"data": _data_section(tokenizer_settings), "sample": sample}
    return _Pair(settings, sections, tokenizer.variables["codebook"]["codebook_KE"])


def _pair_of(tokenizer: Converted | None) -> _Pair | None:
    """Of a tokenizer that stood in the file of its transformer."""
    if tokenizer is None:
        return None
    settings = tokenizer.config["model"]
    sections = {"data": _data_section(settings), "sample": {}}
    return _Pair(settings, sections, tokenizer.variables["codebook"]["codebook_KE"])


def _data_section(tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    image_size, channels = tokenizer["image_size"], tokenizer["in_channels"]
    return {"name": "folder", "data_dir": None, "image_size": image_size, "channels": channels}


def _copy_text_tokenizer(path: str, settings: Mapping[str, Any], directory: Path) -> None:
    from rq_jax.data import load_tokenizer

    length, size = settings.get("cond_length", 1), settings["cond_vocab_size"]
    if length == 1:
        raise ValueError(f"--text_tokenizer: '{path}' is for models of text, this one takes none; leave it out")
    text_tokenizer = load_tokenizer(local_path(path), length)
    if text_tokenizer.vocab_size > size:
        raise ValueError(
            f"--text_tokenizer: '{path}' has {text_tokenizer.vocab_size} ids, the model {size}; give its own"
        )
    text_tokenizer.save(directory / checkpoint.TEXT_TOKENIZER)


def _complete(transformer: Converted, pair: _Pair | None) -> None:
    """Complete a transformer by its tokenizer; without one its codebook is NaN, as in a fresh model."""
    shapes = models.abstract_variables(models.create(**transformer.config["model"])).get("codebook")
    if pair:
        transformer.config.update(pair.sections)
    else:
        missing = "the codebook, which is the tokenizer's, is NaN and " if shapes else ""
        logger.warning(
            "--tokenizer: not given; %sthe directory makes no images; convert the stage 1 of its pair first and give "
            "that directory", missing,
        )  # fmt: skip
    if shapes:
        codebook = {"codebook_KE": pair.codebook} if pair else None
        empty = jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan, leaf.dtype), shapes)
        transformer.variables["codebook"] = codebook or empty
