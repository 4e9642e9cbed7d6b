"""The command line of `rq_jax.report.page`."""

import argparse
from pathlib import Path

from rq_jax.files import local_path
from rq_jax.report import page


def main(arguments: list[str] | None = None) -> None:
    """Write the report of one run directory, or of several beside one another."""
    parser = argparse.ArgumentParser(prog="python -m rq_jax.report", description=page.__doc__.split("\n")[0])
    parser.add_argument("directories", nargs="+", help="run directories; several are set beside one another")
    parser.add_argument("--out", help=f"file to write (default: {page.PAGE} in the directory; needed for several)")
    options = parser.parse_args(arguments)
    try:
        if options.out is None and len(options.directories) > 1:
            raise ValueError(f"--out: missing; name the page of the {len(options.directories)} runs")
        out = local_path(options.out) if options.out else Path(local_path(options.directories[0])) / page.PAGE
        print(f"report: {page.write_page([local_path(name) for name in options.directories], out)}")
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
