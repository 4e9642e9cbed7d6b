"""An official checkpoint becomes a model directory of ours."""

import contextlib
import logging
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from rq_jax import checkpoint, models
from rq_jax.files import local_path
from rq_jax.interop import official, state_file
from rq_jax.settings import checks
from rq_jax.settings.text import quoted

STAGE2, DISCRIMINATOR, TEXT_TOKENIZER = "rqtransformer", "discriminator", "text_tokenizer.json"

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
    use_ema: bool = False,
    key: str | None = None,
) -> Conversion:
    """Convert an official checkpoint to a model directory.

    Args:
      config: official config file, YAML or JSON.
      state: official weights, see `state_file.read_state`.
      out: new directory; the discriminator beside a tokenizer goes into discriminator/ below it.
      tokenizer: directory of the tokenizer of a transformer, converted or trained here; it is copied into `out`.
      text_tokenizer: vocabulary file of a model of text; it is copied into `out`.
      use_ema: take the averaged weights, such as those under "state_dict_ema".
      key: where the weights stand in the file, such as "generator.ema"; needed where several fit.

    Raises:
      ValueError, FileNotFoundError: files that are missing, damaged, or do not fit together; nothing is left behind.
    """
    official_config = state_file.read_config(config)
    kind = official.find_kind(official_config)
    for name, value in (("tokenizer", tokenizer), ("text_tokenizer", text_tokenizer)):
        if value and kind != STAGE2:
            raise ValueError(f"--{name}: {value} is for stage 2, and this is a config of '{kind}'")
    if text_tokenizer and not tokenizer:
        raise ValueError(f"--text_tokenizer: {text_tokenizer} needs --tokenizer beside it; give both")
    with _new_directory(out) as partial:
        # The configs are checked before the weights are read.
        pair = _bind_tokenizer(partial, official_config, tokenizer, text_tokenizer) if tokenizer else None
        settings = pair.settings if pair else official.KINDS[kind].settings(official_config)
        models.create(official.KINDS[kind].model, **settings)
        content = state_file.read_state(state)
        leaves, table = official.leaves_of(content), official.KINDS[kind].table(settings)
        weights = official.pick_weights(leaves, table.names(), use_ema=use_ema, key=key)
        converted, used = {".": _convert(kind, settings, table, weights)}, weights.used
        if kind == STAGE2:
            _add_codebook(converted["."], pair)
        elif kind != DISCRIMINATOR and official.has_discriminator(official_config):
            for settings, table, weights in _find_discriminator(leaves, official_config):
                converted[DISCRIMINATOR] = _convert(DISCRIMINATOR, settings, table, weights)
                used = used + weights.used
        for name, model in converted.items():
            checkpoint.save_model(partial / name, model.config, model.variables)
    return Conversion(kind, converted, official.name_left_out(leaves, used), _unopened(content))


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
    dropped = [tensor for tensor in table.unread if tensor in state]
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


def _bind_tokenizer(directory: Path, config: Mapping[str, Any], path: str, text_path: str | None) -> _Pair:
    """Put the tokenizer, and the text tokenizer where there is one, into a stage-2 directory."""
    tokenizer = checkpoint.load_tokenizer(local_path(path))
    tokenizer_settings = models.settings_of(tokenizer.model)
    settings = official.rqtransformer_settings(config, tokenizer_settings)
    if text_path:
        _copy_text_tokenizer(text_path, settings, directory)
    checkpoint.bind_tokenizer(directory, tokenizer)
    image_size, channels = tokenizer_settings["image_size"], tokenizer_settings["in_channels"]
    data = {"name": "folder", "data_dir": None, "image_size": image_size, "channels": channels}
    sample = official.sample_settings(config)
    for name, value in sample.items():
        checks.one_per_depth(f"sampling.{name}", value, settings["code_shape"][-1])
    sections = {"data": data, "sample": sample}
    return _Pair(settings, sections, tokenizer.variables["codebook"]["codebook_KE"])


def _copy_text_tokenizer(path: str, settings: Mapping[str, Any], directory: Path) -> None:
    from rq_jax.data import load_tokenizer

    length, size = settings["cond_length"], settings["cond_vocab_size"]
    if length == 1:
        raise ValueError(f"--text_tokenizer: '{path}' is for models of text, this one takes none; leave it out")
    text_tokenizer = load_tokenizer(local_path(path), length)
    if text_tokenizer.vocab_size > size:
        raise ValueError(
            f"--text_tokenizer: '{path}' has {text_tokenizer.vocab_size} ids, the model {size}; give its own"
        )
    text_tokenizer.save(directory / TEXT_TOKENIZER)


def _add_codebook(transformer: Converted, pair: _Pair | None) -> None:
    """Complete a transformer by its tokenizer; without one its codebook is NaN, as in a fresh model."""
    model = models.create(**transformer.config["model"])
    if pair:
        transformer.config.update(pair.sections)
    if not model.uses_codebook:
        return
    if pair:
        transformer.variables["codebook"] = {"codebook_KE": pair.codebook}
        return
    logger.warning(
        "--tokenizer: not given; the codebook, which is the tokenizer's, is NaN and the directory makes no images; "
        "convert the stage 1 of its pair first and give that directory"
    )
    shapes = models.abstract_variables(model)["codebook"]
    transformer.variables["codebook"] = jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan, leaf.dtype), shapes)
