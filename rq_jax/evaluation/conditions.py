"""Conditions that samples are drawn with: classes or texts."""

import csv
import difflib
import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rq_jax.checkpoint import PROMPTS, TEXT_TOKENIZER, LoadedModel, local_directory
from rq_jax.data.notices import tell
from rq_jax.data.sources import open_records
from rq_jax.evaluation.protocol import IMAGE_SETTINGS, EvaluationData, trained_on
from rq_jax.files import read_json
from rq_jax.settings.text import quoted

_MOST_TOLD = 10  # unknown words


def choose_conditions(
    loaded: LoadedModel,
    directory: str,
    num_images: int,
    seed: int = 0,
    *,
    classes: str | None = None,
    classes_of: str | None = None,
    prompts: Sequence[str] | None = None,
    prompts_of: str | None = None,
    captions: Sequence[str] | None = None,
    carried: np.ndarray | None = None,
    carrier: str = "",
) -> tuple[np.ndarray | None, Sequence[str]]:
    """The conditions that images take in turn, by id.

    Args:
      loaded: a transformer.
      directory: that it was loaded from, with its text tokenizer.
      num_images: images from id 0 on.
      seed: of classes that are drawn.
      classes: names or numbers, separated by commas; see `parse_classes`.
      classes_of: a split whose classes are taken, in order.
      prompts: texts, for a text-conditional model; None: those in its directory, if it has any.
      prompts_of: a split whose captions are taken, in order.
      captions: those of a data set, for a text-conditional model, in place of prompts; unknown words among them are not
        told, as nobody chose them.
      carried: conditions (m, U) of the images that are continued or edited, which are kept unless others are given.
      carrier: flag and file that they come from, for the error.

    Returns:
      The conditions (m, U), None for an unconditional model, and their m names. Without any given, classes are as
      frequent as in the training set if the model's config has their counts, else all classes come in turn.

    Raises:
      ValueError: classes or prompts that the model does not take or know.
    """
    model, kind = loaded.model, kind_of(loaded)
    for flag, value, needed in (
        ("--classes", classes, "class"),
        ("--classes_of", classes_of, "class"),
        ("--prompt", prompts, "text"),
        ("--prompts_of", prompts_of, "text"),
    ):
        if value is not None and kind != needed:
            raise ValueError(f"{flag}: {value} is for a {needed}-conditional model, this one is {kind}; leave it out")
    if kind == "unconditional":
        return None, [""]
    if prompts_of is not None:
        captions = captions_of_split(loaded.config, prompts_of, num_images)
    if kind == "text":
        return _texts(prompts, captions, directory, model, carried, carrier)
    V = model.cond_vocab_size
    names, counts = _known_classes(loaded.config, V, directory)
    if classes_of is not None:
        numbers = classes_of_split(loaded.config, classes_of)
    elif classes is not None:
        numbers = parse_classes(classes, names)
    elif carried is not None:
        numbers = _carried(carried, 1, V, f"{carrier} holds no classes 0..{V - 1}; give --classes")[:, 0].tolist()
    elif counts:
        numbers = draw_classes(counts, seed, num_images)
    else:
        numbers = list(range(V))
    return np.array(numbers)[:, None], [names[i] for i in numbers]


def read_prompts(path: str | os.PathLike) -> list[str]:
    """The texts of a file: the lines of a .txt that are not blank, or the strings of a list in a .json.

    Raises:
      FileNotFoundError: no such file.
      ValueError: another kind of file, or none with texts.
    """
    path = Path(path)
    if path.suffix not in (".txt", ".json"):
        raise ValueError(f"--prompts: '{path}' is neither .txt, of a text a line, nor .json, of a list of texts")
    if not path.is_file():
        raise FileNotFoundError(f"--prompts: '{path}' is no file; give a .txt or a .json of texts")
    try:
        texts = read_json(path, list) if path.suffix == ".json" else path.read_text("utf-8-sig").split("\n")
    except ValueError as error:
        raise ValueError(f"--prompts: {error}" if path.suffix == ".json" else f"--prompts: '{path}': {error}") from None
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"--prompts: '{path}' holds more than texts; give a list of strings")
    prompts = [text.strip() for text in texts if text.strip()]
    if not prompts:
        raise ValueError(f"--prompts: '{path}' holds no text; give one or more")
    return prompts


def kind_of(loaded: LoadedModel) -> str:
    """The condition of a transformer: "class" or "text", or "unconditional"."""
    model = loaded.model
    return "unconditional" if not model.is_conditional else "class" if model.cond_length == 1 else "text"


def class_names(loaded: LoadedModel) -> list[str]:
    """Names of the classes of a transformer by number; the numbers themselves where it records none.

    Raises:
      ValueError: the model takes no classes.
    """
    if (kind := kind_of(loaded)) != "class":
        raise ValueError(f"classes: this model is {kind}{'-conditional' * (kind == 'text')}, and takes none")
    return loaded.config.get("class_names") or [str(i) for i in range(loaded.model.cond_vocab_size)]


def parse_classes(text: str, names: list[str]) -> list[int]:
    """The numbers of classes in a list separated by commas.

    Args:
      text: an entry is a name, in double quotes where it holds a comma, or else a number in the digits 0 to 9.
      names: by class number; case and the form of accents make no difference, except between two names.

    Raises:
      ValueError: an entry that is no class, or quotes that do not match.
    """
    try:
        (entries,) = csv.reader([text], skipinitialspace=True, strict=True)
    except (csv.Error, ValueError) as error:
        raise ValueError(f"--classes: {quoted(text)} is no list of names and numbers ({error})") from None
    if not entries:
        raise ValueError("--classes: empty; give names or numbers, or leave it out")
    return [class_number(entry.strip(), names) for entry in entries]


def _known_classes(config: dict[str, Any], num_classes: int, directory: str) -> tuple[list[str], list[int] | None]:
    """Names of the classes, their numbers where the config has none; and their counts in the training set."""
    names, counts = config.get("class_names") or list(map(str, range(num_classes))), config.get("class_counts")
    for entry, values in (("class_names", names), ("class_counts", counts)):
        if values and len(values) != num_classes:
            raise ValueError(
                f"'{directory}/config.json': {len(values)} {entry} for a model of {num_classes} classes; "
                f"restore it from a copy, or take {entry} out"
            )
    return names, counts


def class_number(text: str, names: list[str]) -> int:
    """The number of a class, given by name, or else as a number.

    Raises:
      ValueError: no such class.
    """
    folded = [_folded(name) for name in names]
    if text in names:
        return names.index(text)
    if _folded(text) in folded:
        return folded.index(_folded(text))
    if re.fullmatch("[0-9]{1,9}", text) and int(text) < len(names):
        return int(text)
    near = difflib.get_close_matches(_folded(text), folded, 1) or [name for name in folded if _folded(text) in name]
    hint = f"; did you mean {quoted(names[folded.index(near[0])])}?" if text and near else ""
    allowed = f"allowed are 0..{len(names) - 1} and the names that --list_classes shows"
    raise ValueError(f"--classes: {quoted(text)} is no class{hint}; {allowed}")


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def draw_classes(counts: list[int], seed: int, num_images: int) -> list[int]:
    """Classes of image ids 0..num_images - 1, as frequent as `counts`; that of an id depends on the seed alone."""
    return np.random.default_rng(seed).choice(len(counts), num_images, p=np.divide(counts, sum(counts))).tolist()


def classes_of_split(config: dict[str, Any], split: str) -> list[int]:
    """Classes of a split of the data set that a model was trained on, in order.

    Args:
      config: of the model.
      split: "train", "validation" or a split's own name.

    Raises:
      ValueError: the model names no data set, or none with classes, or what lies there now has others.
    """
    settings = trained_on(config, (*IMAGE_SETTINGS, "label_key"))
    if not {"name", "label_key"} <= settings.keys():
        raise ValueError(f"--classes_of: {split} needs the data set of the model, which names none; give --classes")
    dataset = EvaluationData(settings, batch_size=256).open(split)
    own, found = config.get("class_names") or [], list(dataset.class_names or ())
    if own and found != own[: len(found)]:  # some sources know only the classes that a split has
        where = quoted(settings.get("data_dir") or settings["name"])
        raise ValueError(
            f"--classes_of: {split} in {where} has {len(found)} classes, such as {quoted(found[0])}, which are not the "
            f"{len(own)} of the model; give the data set that it was trained on, or other classes than those of a split"
        )
    return [int(label) for batch in dataset.iterator() for label in batch["cond"][batch["mask"], 0]]


def captions_of_split(config: dict[str, Any], split: str, num_images: int) -> list[str]:
    """The first captions of a split of the data set that a model was trained on, in order.

    Args:
      config: of the model.
      split: "train", "validation" or a split's own name.
      num_images: captions, at most.

    Raises:
      ValueError: the model names no data set, or none with captions.
    """
    settings = trained_on(config, (*IMAGE_SETTINGS, "text_key"))
    if not {"name", "text_key"} <= settings.keys():
        raise ValueError(f"--prompts_of: {split} needs the data set of the model, which names none; give --prompts")
    own_name = settings.get({"train": "train_split", "validation": "validation_split"}.get(split, ""), split)
    records = open_records(settings["name"], own_name, settings.get("data_dir"), text_key=settings["text_key"])
    return [records.read(i)[2] for i in range(min(num_images, len(records)))]


def _texts(
    prompts: Sequence[str] | None,
    captions: Sequence[str] | None,
    directory: str,
    model: Any,
    carried: np.ndarray | None,
    carrier: str,
) -> tuple[np.ndarray, Sequence[str]]:
    from rq_jax.data import load_tokenizer

    if not prompts and not captions and carried is None:
        if not (local_directory(directory) / PROMPTS).is_file():
            raise ValueError("--prompt: missing, this model draws images of a text; give one or more")
        prompts = read_prompts(local_directory(directory) / PROMPTS)
    tokenizer = load_tokenizer(local_directory(directory) / TEXT_TOKENIZER, model.cond_length)
    for text in prompts or ():
        try:
            text.encode()
        except UnicodeEncodeError:  # bytes of a command line, or half a pair in JSON
            raise ValueError(f"--prompt: {quoted(text)} is no UTF-8; write it in UTF-8") from None
    if words := tokenizer.words_in_pieces(prompts or ()):
        more = f" and {len(words) - _MOST_TOLD} more" if len(words) > _MOST_TOLD else ""
        told = ", ".join(map(quoted, words[:_MOST_TOLD])) + more
        tell(f"prompts: {told}: words that the captions of training had seldom or never; the model may not know them")
    if texts := prompts or captions:
        return tokenizer(texts), texts
    U, V = model.cond_length, model.cond_vocab_size
    tokens = _carried(carried, U, V, f"{carrier} holds no texts of {U} tokens 0..{V - 1}; give --prompt")
    return tokens, [tokenizer.decode(row) for row in tokens]


def _carried(conds: np.ndarray, length: int, vocab_size: int, message: str) -> np.ndarray:
    """The conditions of an earlier run, as (m, length)."""
    if conds.shape[1:] != (length,) or not ((conds >= 0) & (conds < vocab_size)).all():
        raise ValueError(message)
    return conds
