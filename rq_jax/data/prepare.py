"""Prepare datasets.

python -m rq_jax.data.prepare twemoji                                                 # the bundled images
python -m rq_jax.data.prepare avatars                                                 # avatars with captions
python -m rq_jax.data.prepare folder --source=~/ffhq --name=ffhq --data_dir=~/data    # any folder of images
python -m rq_jax.data.prepare parquet --source=~/hub/cats --name=cats                 # or webdataset, a folder of tars
python -m rq_jax.data.prepare lsun --source=~/lsun/church_outdoor --name=lsun/church_outdoor --data_dir=~/data
"""

import argparse

from rq_jax.data.bundled import prepare
from rq_jax.data.paths import default_data_dir


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m rq_jax.data.prepare", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "kind",
        help="twemoji[/256] or avatars[/128], bundled; folder, parquet, webdataset or lsun, to write as ArrayRecord",
    )
    add("--data_dir", help="directory of datasets; default $RQ_JAX_DATA or ~/.cache/rq_jax")
    add("--source", help="the folder of images or files, or the beginning of LSUN's <category>_train_lmdb")
    add("--name", help="of the new dataset, later given as data.name")
    add("--pictures_per_file", type=int, default=10_000, help="images in a file of the dataset")
    add("--without", action="append", default=[], choices=("labels", "captions"), help="not to be read")
    add("--max_damaged", type=int, default=100, help="images without label or caption to leave out before it stops")
    options = parser.parse_args(arguments)
    try:
        if options.kind not in ("folder", "lsun", "parquet", "webdataset"):
            print(prepare(options.data_dir, options.kind))
            return
        for name in ("source", "name"):
            if getattr(options, name) is None:
                raise ValueError(f"--{name}: missing; '{options.kind}' needs it")
        from rq_jax.data import array_records, convert

        if options.kind == "lsun":
            splits = convert.open_lsun(options.source)
        elif options.kind == "folder":
            splits = convert.open_folder(options.source, options.max_damaged, options.without)
        else:
            splits = convert.open_files(options.kind, options.source, options.max_damaged, options.without)
        data_dir = options.data_dir or default_data_dir()
        print(array_records.write(splits, options.name, data_dir, options.pictures_per_file))
    except (
        ValueError,
        OSError,
        RuntimeError,
        ModuleNotFoundError,
    ) as error:  # RuntimeError: array_record's, for a full disk
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
